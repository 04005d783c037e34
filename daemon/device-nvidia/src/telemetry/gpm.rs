//! Figures of the GPU performance monitor (Hopper and later).
//!
//! The hardware counts; a figure is the difference of two samples, which must
//! lie at least 100 ms apart (nvml.h). The reader keeps the last sample and the
//! figures it led to, so no call ever waits for the interval to pass.

#![expect(
    unsafe_code,
    reason = "a kept sample needs a longer borrow of NVML than the wrapper can express"
)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use nvml_wrapper::enums::gpm::GpmMetricId;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::gpm::gpm_metrics_get;
use nvml_wrapper::{GpmSample, Nvml};

/// Least distance of two samples.
const INTERVAL_MIN: Duration = Duration::from_millis(100);

/// A sample older than this says nothing about now; the next figures come with
/// the sample after the next.
const AGE_MAX: Duration = Duration::from_secs(5);

/// PCIe figures are in MiB per second (nvml.h).
const BYTES_PER_MIB: f64 = 1_048_576.0;

/// Key in utilization.stat, metric, the metric's ceiling and what one is worth
/// in the key's unit; in the interface's order.
const METRICS: [(&str, GpmMetricId, f64, f64); 6] = [
    ("sm_active_percent", GpmMetricId::SmUtil, 100.0, 1.0),
    ("sm_occupancy_percent", GpmMetricId::SmOccupancy, 100.0, 1.0),
    ("tensor_percent", GpmMetricId::AnyTensorUtil, 100.0, 1.0),
    ("dram_percent", GpmMetricId::DramBwUtil, 100.0, 1.0),
    (
        "pcie_tx_bytes_per_sec",
        GpmMetricId::PcieTxPerSec,
        f64::INFINITY,
        BYTES_PER_MIB,
    ),
    (
        "pcie_rx_bytes_per_sec",
        GpmMetricId::PcieRxPerSec,
        f64::INFINITY,
        BYTES_PER_MIB,
    ),
];

/// What is kept of one GPU between two reads.
#[derive(Debug, Default)]
pub(super) struct GpmReader {
    /// `None` until the GPU has been asked.
    supported: Option<bool>,
    previous: Option<KeptSample>,
    figures: Vec<(&'static str, u64)>,
}

impl GpmReader {
    /// The newest figures, none while they are not known. Takes a sample when
    /// the last one is old enough.
    pub(super) fn read(
        &mut self,
        nvml: &Arc<Nvml>,
        uuid: &str,
    ) -> Result<Vec<(&'static str, u64)>, NvmlError> {
        let supported = match self.supported {
            Some(supported) => supported,
            None => {
                let device = nvml.device_by_uuid(uuid)?;
                let supported = super::known(device.gpm_support())?.unwrap_or(false);
                *self.supported.insert(supported)
            }
        };
        if !supported {
            return Ok(Vec::new());
        }
        let age = self.previous.as_ref().map(|sample| sample.at.elapsed());
        if age.is_some_and(|age| age < INTERVAL_MIN) {
            return Ok(self.figures.clone());
        }
        let next = super::known(KeptSample::take(nvml, uuid))?;
        self.figures = match (&self.previous, &next) {
            (Some(previous), Some(next)) if age.is_some_and(|age| age <= AGE_MAX) => {
                super::known(previous.figures_until(next))?.unwrap_or_default()
            }
            _ => Vec::new(),
        };
        self.previous = next;
        Ok(self.figures.clone())
    }
}

/// A sample that keeps the library loaded which it belongs to.
#[derive(Debug)]
struct KeptSample {
    // Fields are dropped in this order: the sample goes before its library.
    sample: GpmSample<'static>,
    nvml: Arc<Nvml>,
    at: Instant,
}

impl KeptSample {
    fn take(nvml: &Arc<Nvml>, uuid: &str) -> Result<Self, NvmlError> {
        // SAFETY: the reference points into the Arc's allocation, which does
        // not move, and which the clone below keeps alive as long as anything
        // that holds the reference: only `sample` does (the device is dropped
        // here), it is dropped before that clone, and it is never moved out of
        // this struct or lent with its long lifetime.
        let extended: &'static Nvml = unsafe { &*Arc::as_ptr(nvml) };
        let sample = extended.device_by_uuid(uuid)?.gpm_sample()?;
        Ok(Self {
            sample,
            nvml: Arc::clone(nvml),
            at: Instant::now(),
        })
    }

    /// Figures of the time from this sample to the next.
    fn figures_until(&self, next: &Self) -> Result<Vec<(&'static str, u64)>, NvmlError> {
        let ids = METRICS.map(|(_, id, _, _)| id);
        let results = gpm_metrics_get(&self.nvml, &self.sample, &next.sample, &ids)?;
        let figures = METRICS.iter().zip(results).filter_map(|(metric, result)| {
            let (key, _, ceiling, unit) = *metric;
            Some((key, whole(result.ok()?.value, ceiling, unit)?))
        });
        Ok(figures.collect())
    }
}

/// A figure in whole units; `None` for what is no number.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the value is not negative, and a cast from a float saturates"
)]
fn whole(value: f64, ceiling: f64, unit: f64) -> Option<u64> {
    value
        .is_finite()
        .then(|| (value.clamp(0.0, ceiling) * unit).round() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentages_are_rounded_and_bounded() {
        assert_eq!(whole(41.5, 100.0, 1.0), Some(42));
        assert_eq!(whole(41.4, 100.0, 1.0), Some(41));
        assert_eq!(whole(100.3, 100.0, 1.0), Some(100));
        assert_eq!(whole(-0.2, 100.0, 1.0), Some(0));
        assert_eq!(whole(f64::NAN, 100.0, 1.0), None);
    }

    #[test]
    fn pcie_figures_become_bytes() {
        assert_eq!(whole(1.5, f64::INFINITY, BYTES_PER_MIB), Some(1_572_864));
    }
}
