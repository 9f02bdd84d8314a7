//! What this machine computes on: its CPU with the memory that is really there, and NVIDIA GPUs through NVML.

use std::fs;
use std::path::{Path, PathBuf};

use nvml_wrapper::Nvml;
use nvml_wrapper::error::NvmlError;
use rbee_wire::DeviceId;
use rbee_wire::hive::{Device, DeviceKind};

/// Why no worker can use a GPU.
const NO_CUDA_WORKER: &str =
    "there is no llm-worker-rbee-cuda beside rbee-hive; `cargo xtask cuda build` makes it from these sources";

/// Oldest compute capability that the worker's kernels run on.
const OLDEST: i32 = 8;

/// Oldest driver, by the CUDA version that it serves (13.0), that takes the worker's kernels.
const CUDA: i32 = 13_000;

/// Looks at the devices. NVML is opened once and kept.
pub struct Devices {
    cpu_name: String,
    cuda_worker: Option<PathBuf>,
    nvml: Result<Nvml, String>,
}

impl Devices {
    /// Finds out what is there. A machine without a driver has no GPU; a driver that fails is told.
    pub fn discover(cuda_worker: Option<PathBuf>) -> Self {
        let nvml = Nvml::init().map_err(|error| match error {
            NvmlError::LibloadingError(_) | NvmlError::LibraryNotFound => String::new(),
            other => format!("the NVIDIA driver does not answer: {other}"),
        });
        Self { cpu_name: cpu_name(), cuda_worker, nvml }
    }

    /// All devices as they are now.
    pub fn list(&self) -> Vec<Device> {
        let mut devices = vec![self.cpu()];
        match &self.nvml {
            Ok(nvml) => {
                let count = nvml.device_count().unwrap_or(0);
                devices.extend((0..count).filter_map(|index| self.gpu(nvml, index)));
            }
            Err(reason) if reason.is_empty() => {}
            Err(reason) => devices.push(Device {
                id: id("cuda:0"),
                name: "NVIDIA GPU".into(),
                kind: DeviceKind::Cuda,
                memory_total: 0,
                memory_free: 0,
                uuid: None,
                compute_capability: None,
                utilisation: None,
                unavailable: Some(reason.clone()),
            }),
        }
        devices
    }

    /// The CPU and its memory as they are now.
    pub fn cpu(&self) -> Device {
        let (total, free) = memory();
        Device {
            id: id("cpu"),
            name: self.cpu_name.clone(),
            kind: DeviceKind::Cpu,
            memory_total: total,
            memory_free: free,
            uuid: None,
            compute_capability: None,
            utilisation: None,
            unavailable: None,
        }
    }

    /// The worker's program for GPUs.
    pub fn cuda_worker(&self) -> Option<&Path> {
        // It may have been built since the hive was started.
        self.cuda_worker.as_deref().filter(|program| program.is_file())
    }

    fn gpu(&self, nvml: &Nvml, index: u32) -> Option<Device> {
        let device = nvml.device_by_index(index).ok()?;
        let memory = device.memory_info().ok();
        let capability = device.cuda_compute_capability().ok();
        let driver = nvml.sys_cuda_driver_version().unwrap_or(0);
        let unavailable = match &capability {
            _ if self.cuda_worker().is_none() => Some(NO_CUDA_WORKER.to_owned()),
            Some(found) if found.major < OLDEST => {
                Some(format!("it has compute capability {}.{}, and 8.0 is needed", found.major, found.minor))
            }
            _ if driver < CUDA => Some(format!(
                "its driver serves CUDA {}.{}, and 13.0 is needed: driver 580 or later",
                driver / 1000,
                driver % 1000 / 10
            )),
            _ => None,
        };
        Some(Device {
            id: id(&format!("cuda:{index}")),
            name: device.name().unwrap_or_else(|_| "NVIDIA GPU".into()),
            kind: DeviceKind::Cuda,
            memory_total: memory.as_ref().map_or(0, |memory| memory.total),
            memory_free: memory.as_ref().map_or(0, |memory| memory.free),
            uuid: device.uuid().ok(),
            compute_capability: capability.map(|capability| format!("{}.{}", capability.major, capability.minor)),
            utilisation: device.utilization_rates().ok().map(|rates| f64::from(rates.gpu) / 100.0),
            unavailable,
        })
    }
}

fn id(text: &str) -> DeviceId {
    DeviceId::new(text).expect("a short word is an id")
}

fn cpu_name() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name =
        text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':').map(|(_, name)| name.trim()));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    format!("{} ({cores} cores)", name.unwrap_or("CPU"))
}

/// Memory in all and available, in bytes: the machine's, or the control group's where that is less.
fn memory() -> (u64, u64) {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let (total, free) = (meminfo(&text, "MemTotal:"), meminfo(&text, "MemAvailable:"));
    let number = |path: &str| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let limit = number("/sys/fs/cgroup/memory.max").or_else(|| number("/sys/fs/cgroup/memory/memory.limit_in_bytes"));
    let used =
        number("/sys/fs/cgroup/memory.current").or_else(|| number("/sys/fs/cgroup/memory/memory.usage_in_bytes"));
    match (limit, used) {
        (Some(limit), Some(used)) if limit < total => (limit, free.min(limit.saturating_sub(used))),
        _ => (total, free),
    }
}

/// Bytes that a line of `/proc/meminfo` or of a process's `status` says; 0 where there is none.
pub(crate) fn meminfo(text: &str, key: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_as_bytes() {
        let text = "MemTotal:       24 kB\nMemFree: 1 kB\nMemAvailable:    7 kB\n";
        assert_eq!(
            (meminfo(text, "MemTotal:"), meminfo(text, "MemAvailable:"), meminfo(text, "X:")),
            (24 << 10, 7 << 10, 0)
        );
        let (total, free) = memory();
        assert!(total > 0 && free <= total, "{total} {free}");
    }
}
