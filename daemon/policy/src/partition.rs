//! Which SM groups belong to which partition of one GPU.
//!
//! Group numbers mean the same SMs in every client of one MPS server (measured
//! on an H200), so this one table keeps partitions of different processes
//! disjoint. Groups are equal but the last, which may be a smaller remainder.

use std::collections::BTreeMap;

use gcgroup_model::value::{PartitionName, SmRequest};

/// The SM groups of a GPU and their owners.
#[derive(Clone, Debug)]
pub struct SmTable {
    sizes: Vec<u32>,
    owners: Vec<Option<PartitionName>>,
    partitions: BTreeMap<PartitionName, Vec<u32>>,
}

/// Why a partition did not get its SMs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SmError {
    /// There is no such partition.
    NoPartition,
    /// The name is taken.
    Exists,
    /// More SMs than the GPU has.
    TooMany {
        /// SMs of the GPU.
        capacity: u32,
    },
    /// Others own too many.
    Taken {
        /// SMs that this partition could have at most.
        available: u32,
    },
}

impl SmTable {
    /// A table with every group free; `sizes` are SMs by group number.
    #[must_use]
    pub fn new(sizes: Vec<u32>) -> Self {
        let owners = vec![None; sizes.len()];
        Self {
            sizes,
            owners,
            partitions: BTreeMap::new(),
        }
    }

    /// SMs of the GPU.
    #[must_use]
    pub fn capacity(&self) -> u32 {
        self.sizes.iter().sum()
    }

    /// SMs of a whole group.
    #[must_use]
    pub fn granularity(&self) -> u32 {
        self.sizes.iter().copied().max().unwrap_or(0)
    }

    /// Adds a partition that owns nothing yet.
    ///
    /// # Errors
    /// [`SmError::Exists`].
    pub fn add(&mut self, name: PartitionName) -> Result<(), SmError> {
        if self.partitions.contains_key(&name) {
            return Err(SmError::Exists);
        }
        self.partitions.insert(name, Vec::new());
        Ok(())
    }

    /// Removes a partition and frees its groups.
    ///
    /// # Errors
    /// [`SmError::NoPartition`].
    pub fn remove(&mut self, name: &PartitionName) -> Result<(), SmError> {
        let groups = self.partitions.remove(name).ok_or(SmError::NoPartition)?;
        for group in groups {
            self.owners[group as usize] = None;
        }
        Ok(())
    }

    /// Groups of a partition, ascending.
    #[must_use]
    pub fn groups(&self, name: &PartitionName) -> Option<&[u32]> {
        self.partitions.get(name).map(Vec::as_slice)
    }

    /// SMs of these groups together.
    #[must_use]
    pub fn sms(&self, groups: &[u32]) -> u32 {
        groups.iter().map(|&group| self.sizes[group as usize]).sum()
    }

    /// The groups that a partition would own after a request, ascending, without
    /// giving them yet. It keeps what it has where it can, and the smaller
    /// remainder goes out last.
    ///
    /// # Errors
    /// [`SmError::TooMany`] and [`SmError::Taken`] where they do not suffice.
    pub fn choose(&self, name: &PartitionName, request: SmRequest) -> Result<Vec<u32>, SmError> {
        let own = self.partitions.get(name).ok_or(SmError::NoPartition)?;
        let whole = self.granularity();
        let reachable = |group: &u32| own.contains(group) || self.owners[*group as usize].is_none();
        let mut candidates: Vec<u32> = (0..u32::try_from(self.sizes.len()).unwrap_or(0))
            .filter(reachable)
            .collect();
        // Whole groups before the remainder, own ones before free ones.
        candidates.sort_by_key(|group| {
            (
                self.sizes[*group as usize] < whole,
                !own.contains(group),
                *group,
            )
        });
        let wanted = match request {
            SmRequest::Max => u32::MAX,
            SmRequest::Count(count) if count > self.capacity() => {
                return Err(SmError::TooMany {
                    capacity: self.capacity(),
                });
            }
            SmRequest::Count(count) => count,
        };
        let mut chosen = Vec::new();
        let mut granted = 0;
        for group in candidates {
            if granted >= wanted {
                break;
            }
            granted += self.sizes[group as usize];
            chosen.push(group);
        }
        let enough = match request {
            SmRequest::Max => granted > 0,
            SmRequest::Count(_) => granted >= wanted,
        };
        if !enough {
            return Err(SmError::Taken { available: granted });
        }
        chosen.sort_unstable();
        Ok(chosen)
    }

    /// Gives a partition exactly these groups; those it had are freed first.
    ///
    /// # Errors
    /// [`SmError::NoPartition`], or [`SmError::Taken`] when another partition
    /// owns one of them; nothing changes then.
    pub fn assign(&mut self, name: &PartitionName, groups: Vec<u32>) -> Result<(), SmError> {
        if !self.partitions.contains_key(name) {
            return Err(SmError::NoPartition);
        }
        let foreign = |group: &u32| {
            self.owners
                .get(*group as usize)
                .is_none_or(|owner| owner.as_ref().is_some_and(|o| o != name))
        };
        if groups.iter().any(foreign) {
            return Err(SmError::Taken { available: 0 });
        }
        for owner in &mut self.owners {
            if owner.as_ref() == Some(name) {
                *owner = None;
            }
        }
        for &group in &groups {
            self.owners[group as usize] = Some(name.clone());
        }
        self.partitions.insert(name.clone(), groups);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn h200() -> SmTable {
        let mut sizes = vec![8; 16];
        sizes.push(4);
        SmTable::new(sizes)
    }

    fn name(text: &str) -> PartitionName {
        text.parse().expect("a well-formed name")
    }

    fn resize(table: &mut SmTable, of: &str, request: SmRequest) -> Result<u32, SmError> {
        let groups = table.choose(&name(of), request)?;
        let granted = table.sms(&groups);
        table.assign(&name(of), groups).map(|()| granted)
    }

    #[test]
    fn a_count_is_rounded_up_to_whole_groups() {
        let mut table = h200();
        table.add(name("a")).expect("a free name");
        assert_eq!(resize(&mut table, "a", SmRequest::Count(60)), Ok(64));
        assert_eq!(resize(&mut table, "a", SmRequest::Count(1)), Ok(8));
        assert_eq!(resize(&mut table, "a", SmRequest::Count(0)), Ok(0));
    }

    #[test]
    fn the_remainder_goes_out_last() {
        let mut table = h200();
        table.add(name("a")).expect("a free name");
        table.add(name("b")).expect("a free name");
        assert_eq!(resize(&mut table, "a", SmRequest::Count(128)), Ok(128));
        assert_eq!(
            table.groups(&name("a")).map(|g| g.contains(&16)),
            Some(false)
        );
        assert_eq!(resize(&mut table, "b", SmRequest::Count(4)), Ok(4));
        assert_eq!(
            resize(&mut table, "b", SmRequest::Count(5)),
            Err(SmError::Taken { available: 4 })
        );
        table.remove(&name("b")).expect("it exists");
        assert_eq!(resize(&mut table, "a", SmRequest::Max), Ok(132));
    }

    #[test]
    fn a_smaller_partition_keeps_groups_that_it_had() {
        let mut table = h200();
        table.add(name("a")).expect("a free name");
        table.add(name("b")).expect("a free name");
        resize(&mut table, "a", SmRequest::Count(32)).expect("all is free");
        resize(&mut table, "b", SmRequest::Count(64)).expect("enough is free");
        let before = table.groups(&name("b")).expect("it exists").to_vec();
        resize(&mut table, "b", SmRequest::Count(32)).expect("less than before");
        let after = table.groups(&name("b")).expect("it exists");
        assert!(after.iter().all(|group| before.contains(group)));
    }

    #[test]
    fn more_than_the_gpu_has_is_told_apart_from_what_others_took() {
        let mut table = h200();
        table.add(name("a")).expect("a free name");
        table.add(name("b")).expect("a free name");
        assert_eq!(
            resize(&mut table, "a", SmRequest::Count(133)),
            Err(SmError::TooMany { capacity: 132 })
        );
        resize(&mut table, "a", SmRequest::Max).expect("all is free");
        assert_eq!(
            resize(&mut table, "b", SmRequest::Max),
            Err(SmError::Taken { available: 0 })
        );
    }

    proptest! {
        #[test]
        fn groups_never_have_two_owners(
            steps in proptest::collection::vec((0_usize..4, 0_u32..140), 1..60)
        ) {
            let names = ["a", "b", "c", "d"].map(name);
            let mut table = h200();
            for n in &names {
                table.add(n.clone()).expect("a free name");
            }
            for (index, count) in steps {
                let before = table.clone();
                let request = if count > 135 { SmRequest::Max } else { SmRequest::Count(count) };
                match table.choose(&names[index], request) {
                    Ok(groups) => {
                        if let SmRequest::Count(count) = request {
                            prop_assert!(table.sms(&groups) >= count);
                        }
                        table.assign(&names[index], groups).expect("chosen groups are free");
                    }
                    Err(_) => prop_assert_eq!(&before.owners, &table.owners),
                }
                let mut seen = std::collections::HashSet::new();
                for n in &names {
                    for group in table.groups(n).expect("it exists") {
                        prop_assert!(seen.insert(*group));
                        prop_assert_eq!(table.owners[*group as usize].as_ref(), Some(n));
                    }
                }
                let owned = table.owners.iter().flatten().count();
                prop_assert_eq!(owned, seen.len());
            }
        }
    }
}
