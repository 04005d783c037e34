//! How launches that run at the same time share the SMs and the memory.
//!
//! All blocks of a launch are spread evenly over the SMs that it may use, so the
//! SMs of a group are alike and one computation serves the group. On each SM the
//! places of threads are shared first, then the issue slots among the blocks that
//! found a place; the bandwidth pools come last. Each time everybody gets an
//! equal part, and what somebody cannot use goes to the others.

use crate::cost::{Cost, DRAM, L2, Pool, THREADS_PER_SM};

/// One launch that is on the device.
#[derive(Clone, Debug)]
pub(crate) struct Demand {
    /// Its blocks.
    pub(crate) blocks: f64,
    /// What one unit of a block costs.
    pub(crate) cost: Cost,
    /// Bit g is set where it may use group g.
    pub(crate) groups: u32,
}

/// How busy the device is, each a share from 0 to 1.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Usage {
    /// Time with anything running.
    pub(crate) busy: f64,
    /// SMs with a block on them.
    pub(crate) sm_active: f64,
    /// Places of threads that are taken.
    pub(crate) occupancy: f64,
    /// Bandwidth of device memory.
    pub(crate) dram: f64,
}

impl Usage {
    /// Adds what another one has in its share of the time.
    pub(crate) fn add(&mut self, other: &Self, share: f64) {
        self.busy += other.busy * share;
        self.sm_active += other.sm_active * share;
        self.occupancy += other.occupancy * share;
        self.dram += other.dram * share;
    }

    /// Moves towards another one by a share of the distance.
    pub(crate) fn approach(&mut self, other: &Self, share: f64) {
        let kept = *self;
        *self = Self::default();
        self.add(&kept, 1.0 - share);
        self.add(other, share);
    }
}

/// Units of all its blocks that each launch does in a microsecond, and how busy
/// the device is with them.
pub(crate) fn rates(group_sms: &[u32], demands: &[Demand]) -> (Vec<f64>, Usage) {
    let mut rates = vec![0.0; demands.len()];
    let mut usage = Usage::default();
    let all: u32 = group_sms.iter().sum();
    for (group, &sms) in group_sms.iter().enumerate() {
        let here: Vec<usize> = (0..demands.len())
            .filter(|&i| demands[i].groups & (1 << group) != 0)
            .collect();
        let sms = f64::from(sms);
        let resident = residents(group_sms, demands, &here);
        let wants: Vec<f64> = here
            .iter()
            .zip(&resident)
            .map(|(&i, blocks)| (blocks * demands[i].cost.share).min(1.0))
            .collect();
        for (&i, slots) in here.iter().zip(fair(1.0, &wants)) {
            rates[i] += sms * slots / demands[i].cost.sm_us;
        }
        let threads: f64 = here
            .iter()
            .zip(&resident)
            .map(|(&i, blocks)| blocks * demands[i].cost.threads)
            .sum();
        usage.sm_active += resident.iter().sum::<f64>().min(1.0) * sms / f64::from(all);
        usage.occupancy += threads / THREADS_PER_SM * sms / f64::from(all);
    }
    for (pool, capacity) in [(Pool::Dram, DRAM), (Pool::L2, L2)] {
        let wants: Vec<f64> = demands
            .iter()
            .zip(&rates)
            .map(|(demand, rate)| bytes_of(demand, pool) * rate)
            .collect();
        let granted = fair(capacity, &wants);
        for ((rate, want), granted) in rates.iter_mut().zip(&wants).zip(&granted) {
            if *want > 0.0 {
                *rate *= granted / want;
            }
        }
        if pool == Pool::Dram {
            usage.dram = granted.iter().sum::<f64>() / capacity;
        }
    }
    usage.busy = if demands.is_empty() { 0.0 } else { 1.0 };
    (rates, usage)
}

fn bytes_of(demand: &Demand, pool: Pool) -> f64 {
    if demand.cost.pool == pool {
        demand.cost.bytes
    } else {
        0.0
    }
}

/// Blocks of each launch that have a place on one SM of a group.
fn residents(group_sms: &[u32], demands: &[Demand], here: &[usize]) -> Vec<f64> {
    let wants: Vec<f64> = here
        .iter()
        .map(|&i| {
            let demand = &demands[i];
            demand.blocks / sm_count(group_sms, demand.groups) * demand.cost.threads
        })
        .collect();
    here.iter()
        .zip(fair(THREADS_PER_SM, &wants))
        .map(|(&i, threads)| threads / demands[i].cost.threads)
        .collect()
}

fn sm_count(group_sms: &[u32], groups: u32) -> f64 {
    let sms = group_sms.iter().enumerate();
    f64::from(
        sms.filter(|(group, _)| groups & (1 << group) != 0)
            .map(|(_, sms)| sms)
            .sum::<u32>()
            .max(1),
    )
}

/// Shares a capacity: equal parts, and what one does not want goes to the rest.
fn fair(capacity: f64, wants: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..wants.len()).collect();
    order.sort_by(|&a, &b| wants[a].total_cmp(&wants[b]));
    let mut granted = vec![0.0; wants.len()];
    let mut left = capacity;
    for (served, &i) in order.iter().enumerate() {
        granted[i] = wants[i].min(left / (wants.len() - served) as f64);
        left -= granted[i];
    }
    granted
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shape::GROUPS;

    fn arithmetic(blocks: f64, groups: u32, share: f64) -> Demand {
        Demand {
            blocks,
            cost: Cost {
                sm_us: 0.01,
                share,
                threads: 1024.0,
                bytes: 0.0,
                pool: Pool::Dram,
            },
            groups,
        }
    }

    const ALL: u32 = (1 << 17) - 1;

    #[test]
    fn what_one_cannot_use_goes_to_the_others() {
        assert_eq!(fair(1.0, &[0.1, 1.0, 1.0]), [0.1, 0.45, 0.45]);
        assert_eq!(fair(1.0, &[0.25, 0.25]), [0.25, 0.25]);
        assert!(fair(1.0, &[]).is_empty());
    }

    #[test]
    fn blocks_that_leave_an_sm_half_idle_do_not_slow_each_other() {
        let half = arithmetic(132.0, ALL, 0.5);
        let (alone, _) = rates(&GROUPS, std::slice::from_ref(&half));
        let (both, _) = rates(&GROUPS, &[half.clone(), half]);
        assert_eq!(both, [alone[0], alone[0]]);
    }

    #[test]
    fn fewer_blocks_than_sms_use_no_more_sms_than_they_are() {
        let (few, usage) = rates(&GROUPS, &[arithmetic(66.0, ALL, 1.0)]);
        let (many, _) = rates(&GROUPS, &[arithmetic(132.0, ALL, 1.0)]);
        assert!((many[0] / few[0] - 2.0).abs() < 1e-9);
        assert!((usage.sm_active - 0.5).abs() < 1e-9);
    }

    #[test]
    fn blocks_without_a_place_wait() {
        let sleeper = arithmetic(264.0, ALL, 0.001);
        let (alone, usage) = rates(&GROUPS, std::slice::from_ref(&sleeper));
        let (both, _) = rates(&GROUPS, &[sleeper.clone(), sleeper]);
        assert!((both[0] / alone[0] - 0.5).abs() < 1e-9);
        assert!((usage.occupancy - 1.0).abs() < 1e-9);
    }
}
