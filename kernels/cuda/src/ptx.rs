//! The compiled-in PTX, one module a kernel file.

use gcgroup_kernels::engine::EngineError;

/// The module of a kernel file, by the file's stem; it ends with the zero byte that the driver
/// reads up to.
macro_rules! modules {
    ($($stem:literal),* $(,)?) => {
        const MODULES: &[(&str, &str)] = &[
            $(($stem, concat!(include_str!(concat!("../ptx/", $stem, ".ptx")), "\0")),)*
        ];
    };
}

modules!(
    "copy",
    "copy_per_block",
    "fill",
    "fma_fp32",
    "mul_fp32",
    "mul_fp64",
    "sleep",
);

/// The PTX of a kernel file.
///
/// # Errors
/// [`EngineError::Unsupported`] where there is no such file.
pub(crate) fn module(stem: &str) -> Result<&'static str, EngineError> {
    MODULES
        .iter()
        .find(|(name, _)| *name == stem)
        .map(|(_, ptx)| *ptx)
        .ok_or_else(|| EngineError::Unsupported(format!("there is no PTX of kernel {stem:?}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use gcgroup_kernels::catalogue::KERNELS;
    use gcgroup_kernels::engine::Form;

    #[test]
    fn every_kernel_of_the_catalogue_has_all_its_entry_points() {
        for kernel in KERNELS {
            let ptx = module(kernel.name).expect("a module of the kernel's name");
            for ilp in kernel.ilp.clone() {
                for form in [Form::Sliced, Form::Uncut] {
                    let entry = format!(".visible .entry {}(", kernel.entry_point(ilp, form));
                    assert!(ptx.contains(&entry), "{entry}");
                }
            }
        }
    }

    #[test]
    fn the_ptx_loads_on_drivers_of_cuda_12_4() {
        for (stem, ptx) in MODULES {
            assert!(ptx.contains("\n.version 8.4\n"), "{stem}");
            assert!(ptx.contains("\n.target sm_80\n"), "{stem}");
            assert!(ptx.ends_with("\n\0"), "{stem}");
        }
    }

    #[test]
    fn an_unknown_kernel_is_an_error() {
        assert!(matches!(module("nosuch"), Err(EngineError::Unsupported(_))));
    }
}
