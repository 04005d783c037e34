//! The errno of each refusal.
//!
//! Both matches are without a wildcard: a new way to refuse something does not
//! compile until it has an errno.

use gcgroup_model::Refusal;
use gcgroup_model::value::ValueError;
use rustix::io::Errno;

/// The errno that a caller gets for a refusal of the service.
pub(crate) fn of_refusal(refusal: &Refusal) -> Errno {
    match refusal {
        Refusal::Invalid(_) | Refusal::Spec(_) => Errno::INVAL,
        Refusal::InField { refusal, .. } => of_refusal(refusal),
        Refusal::Range(_) => Errno::RANGE,
        Refusal::NotFound(_) => Errno::NOENT,
        Refusal::Exists(_) => Errno::EXIST,
        Refusal::Gone(_) => Errno::NODEV,
        Refusal::NoProcess(_) => Errno::SRCH,
        Refusal::Busy(_) => Errno::BUSY,
        Refusal::Unsupported(_) => Errno::OPNOTSUPP,
        Refusal::Denied(_) => Errno::PERM,
        Refusal::NoSpace(_) => Errno::NOSPC,
        Refusal::NoMemory(_) => Errno::NOMEM,
        Refusal::Failed(_) => Errno::IO,
        Refusal::TimedOut { .. } => Errno::TIMEDOUT,
    }
}

/// The errno that a caller gets for bytes that are not a value.
pub(crate) fn of_value(error: &ValueError) -> Errno {
    match error {
        ValueError::Invalid { .. } => Errno::INVAL,
        ValueError::Range { .. } => Errno::RANGE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gcgroup_model::change::Begun;
    use gcgroup_model::spec::SpecError;

    #[test]
    fn every_refusal_has_the_errno_that_the_interface_promises() {
        let text = String::new;
        let timed_out = |begun| Refusal::TimedOut {
            what: text(),
            limit_ms: 5000,
            begun,
        };
        for (refusal, errno) in [
            (Refusal::Invalid(text()), Errno::INVAL),
            (Refusal::Spec(SpecError::new("gpu", "")), Errno::INVAL),
            (Refusal::Range(text()), Errno::RANGE),
            (Refusal::Exists(text()).of_field("name"), Errno::EXIST),
            (Refusal::NotFound(text()), Errno::NOENT),
            (Refusal::Exists(text()), Errno::EXIST),
            (Refusal::Gone(text()), Errno::NODEV),
            (Refusal::NoProcess(1), Errno::SRCH),
            (Refusal::Busy(text()), Errno::BUSY),
            (Refusal::Unsupported(text()), Errno::OPNOTSUPP),
            (Refusal::Denied(text()), Errno::PERM),
            (Refusal::NoSpace(text()), Errno::NOSPC),
            (Refusal::NoMemory(text()), Errno::NOMEM),
            (Refusal::Failed(text()), Errno::IO),
            (timed_out(Begun::No), Errno::TIMEDOUT),
            (timed_out(Begun::Yes), Errno::TIMEDOUT),
        ] {
            assert_eq!(of_refusal(&refusal), errno, "{refusal:?}");
        }
    }

    #[test]
    fn a_value_error_has_the_same_errno_by_way_of_a_refusal() {
        for error in [
            ValueError::Invalid {
                found: String::new(),
                allowed: "",
            },
            ValueError::Range {
                found: String::new(),
                allowed: "",
            },
        ] {
            assert_eq!(of_value(&error), of_refusal(&Refusal::from(error.clone())));
        }
    }
}
