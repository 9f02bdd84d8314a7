//! What a load would need on each device, and what is there: what the queen's placement and `rbee plan` see, and what a
//! reservation is made by.

use std::time::Duration;

use rbee_catalog::CancellationToken;
use rbee_supervisor::run_bounded;
use rbee_wire::event::{Event, NoteLevel};
use rbee_wire::hive::{Device, DeviceKind, Process, ProcessState};
use rbee_wire::job::ModelPlan;
use rbee_wire::view::{Held, LoadNeeds, PlanView, Room, WouldFit};
use rbee_wire::worker::LoadOptions;
use rbee_wire::{DeviceSpec, ErrorBody, ErrorCode, ModelRef};
use serde_json::json;

use crate::devices::meminfo;
use crate::spawn::Spawner;

/// Upper bound of what the built-in model needs with the default slots, so that a first start need not measure it.
pub const TINYBEE_NEEDS: u64 = 160 << 20;

/// Context that is proposed where the usual one does not fit.
const SHORT_CONTEXT: u32 = 2048;

/// Longest time to learn what a model needs.
const INSPECT: Duration = Duration::from_secs(10);

/// What a load may have.
#[derive(Debug, PartialEq)]
pub(crate) struct Granted {
    pub(crate) reserved: u64,
    /// Bytes of KV, where they are fewer than asked for.
    pub(crate) kv: Option<u64>,
}

/// What of `free` bytes a load gets: all it asks for, else less KV and a sixteenth left to others, but never less than it can
/// be used with.
fn granted(needs: &LoadNeeds, free: u64) -> Option<Granted> {
    if needs.total <= free {
        return Some(Granted { reserved: needs.total, kv: None });
    }
    let reserved = needs.least.max(free - free / 16).min(needs.total);
    let kv = needs.kv.saturating_sub(needs.total - reserved);
    (needs.least <= free).then_some(Granted { reserved, kv: Some(kv) })
}

/// Where a load goes.
pub(crate) struct Choice {
    pub(crate) device: Device,
    /// What the load needs there.
    pub(crate) needs: LoadNeeds,
    /// Bytes that were free.
    pub(crate) free: u64,
    /// What it gets of them.
    pub(crate) granted: Granted,
}

/// Bytes that a process has for itself alone; 0 when there is none.
fn anonymous(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    meminfo(&text, "RssAnon:")
}

/// Bytes of a process on its device: those it has and, beyond them, those that are reserved for it.
struct Share {
    has: u64,
    reserved: u64,
}

impl Share {
    /// A worker on the CPU takes its KV page by page as texts come, one on a GPU has taken everything when it is ready.
    fn of(process: &Process, kind: DeviceKind) -> Self {
        let has = match (kind, process.state) {
            (DeviceKind::Cpu, _) => anonymous(process.pid),
            (DeviceKind::Cuda, ProcessState::Ready | ProcessState::Draining) => process.reserved,
            (DeviceKind::Cuda, _) => 0,
        };
        Self { has, reserved: process.reserved }
    }

    fn not_taken(&self) -> u64 {
        self.reserved.saturating_sub(self.has)
    }

    fn all(&self) -> u64 {
        self.reserved.max(self.has)
    }
}

impl Spawner {
    /// What a load would need, and what is there.
    ///
    /// # Errors
    /// When the model cannot be used anywhere, or the device that is named.
    pub async fn plan(
        &self,
        plan: &ModelPlan,
        tell: &(dyn Fn(Event) + Sync),
        stop: &CancellationToken,
    ) -> Result<PlanView, ErrorBody> {
        let path =
            if plan.fetch { self.locate(&plan.model, tell, stop).await? } else { self.stored(&plan.model).await? };
        let rooms = self.rooms(&plan.model, path.as_deref(), plan.device, &plan.load).await?;
        Ok(PlanView { model: plan.model.clone(), hive_id: self.hive_id.clone(), rooms })
    }

    /// The devices that a load may go to, the best first: GPUs by what they have free, then the CPU. The built-in model is small
    /// enough for the CPU, which has it ready sooner than a GPU's driver starts; and who says how many threads compute means the CPU.
    pub(crate) async fn rooms(
        &self,
        model: &ModelRef,
        path: Option<&str>,
        wanted: DeviceSpec,
        load: &LoadOptions,
    ) -> Result<Vec<Room>, ErrorBody> {
        let file = path.map_or_else(|| model.to_string(), str::to_owned);
        let devices = match wanted {
            DeviceSpec::Auto if self.simulates() || *model == ModelRef::Tinybee || load.threads.is_some() => {
                vec![self.devices.cpu()]
            }
            DeviceSpec::Auto => {
                let usable = |device: &Device| device.unavailable.is_none();
                let mut devices: Vec<Device> = self.devices.list().into_iter().filter(usable).collect();
                devices.sort_by_key(|device| (device.kind == DeviceKind::Cpu, std::cmp::Reverse(self.free(device))));
                devices
            }
            DeviceSpec::Cpu | DeviceSpec::Cuda(_) => vec![self.device(wanted)?],
        };
        let (mut rooms, mut refusal) = (Vec::new(), None);
        for device in devices {
            let room = match self.needed(&device, model, &file, load).await {
                Ok(needs) => self.room(&device, model, &file, load, needs).await,
                Err(error) => {
                    let refused = Some(error.message.clone());
                    refusal = Some(error);
                    Room { refused, ..self.bare(&device) }
                }
            };
            rooms.push(room);
        }
        match refusal {
            Some(error) if rooms.iter().all(|room| room.needs.is_none()) => Err(error),
            _ => Ok(rooms),
        }
    }

    /// The first device that has room.
    pub(crate) fn choose(&self, rooms: &[Room], tell: &(dyn Fn(Event) + Sync)) -> Option<Choice> {
        let devices = self.devices.list();
        for room in rooms {
            let device = devices.iter().find(|device| device.id == room.device);
            let granted = room.needs.and_then(|needs| Some((needs, granted(&needs, room.free)?)));
            if let (Some(device), Some((needs, granted))) = (device, granted) {
                return Some(Choice { device: device.clone(), needs, free: room.free, granted });
            }
            let why = match &room.needs {
                Some(needs) => {
                    format!("it has {} MiB free and the load needs {} MiB", room.free >> 20, needs.least >> 20)
                }
                None => room.refused.clone().unwrap_or_else(|| "it cannot be used".into()),
            };
            tell(Event::note(NoteLevel::Info, format!("not on {}: {why}", room.device)));
        }
        None
    }

    fn bare(&self, device: &Device) -> Room {
        Room {
            device: device.id.clone(),
            total: device.memory_total,
            free: self.free(device),
            needs: None,
            context_fits: None,
            refused: None,
            would_fit: Vec::new(),
            held: self.held(device),
        }
    }

    async fn room(&self, device: &Device, model: &ModelRef, file: &str, load: &LoadOptions, needs: LoadNeeds) -> Room {
        let mut room = Room { needs: Some(needs), ..self.bare(device) };
        let base = needs.total.saturating_sub(needs.kv);
        room.context_fits = room
            .free
            .checked_sub(base)
            .map(|left| (left / needs.kv_per_token.max(1)).min(needs.context))
            .filter(|tokens| *tokens > 0);
        if !room.fits() {
            room.would_fit = self.ways(device, model, file, load, room.free).await;
        }
        room
    }

    /// Other ways to load a model that fit into what is free: fewer bits, a shorter context, both.
    async fn ways(
        &self,
        device: &Device,
        model: &ModelRef,
        file: &str,
        asked: &LoadOptions,
        free: u64,
    ) -> Vec<WouldFit> {
        let way = |ctx: Option<u32>, quantize: Option<&str>| LoadOptions {
            ctx: ctx.or(asked.ctx),
            quantize: quantize.map(str::to_owned).or_else(|| asked.quantize.clone()),
            ..asked.clone()
        };
        let short = Some(asked.ctx.unwrap_or(SHORT_CONTEXT).min(SHORT_CONTEXT));
        let mut fitting = Vec::new();
        for load in [way(None, Some("q8_0")), way(None, Some("q4_k")), way(short, Some("q4_k")), way(short, None)] {
            // What cannot be inspected is not proposed.
            if load != *asked
                && let Ok(needs) = self.needed(device, model, file, &load).await
                && needs.least <= free
            {
                let quantize = load.quantize.as_ref().map(|form| format!("--quantize {form}"));
                let ctx = load.ctx.filter(|_| load.ctx != asked.ctx).map(|ctx| format!("--ctx {ctx}"));
                let flags: Vec<String> = quantize.into_iter().chain(ctx).collect();
                fitting.push(WouldFit { flags: flags.join(" "), needed: needs.least, load });
            }
        }
        fitting
    }

    /// Bytes that the load needs, from the header of the model's file or folder, read by a worker.
    async fn needed(
        &self,
        device: &Device,
        model: &ModelRef,
        file: &str,
        load: &LoadOptions,
    ) -> Result<LoadNeeds, ErrorBody> {
        let LoadOptions { ctx, slots, kv_type, quantize, .. } = load;
        let slots = slots.unwrap_or(self.slots);
        let plain =
            device.kind == DeviceKind::Cpu && ctx.is_none() && slots <= 8 && kv_type.is_none() && quantize.is_none();
        if self.simulates() || (*model == ModelRef::Tinybee && plain) {
            return Ok(LoadNeeds { total: TINYBEE_NEEDS, least: TINYBEE_NEEDS, ..LoadNeeds::default() });
        }
        let mut command = std::process::Command::new(self.program(device));
        command.arg("inspect").arg(file);
        command.arg("--slots").arg(slots.to_string());
        for (name, value) in
            [("--ctx", &ctx.map(|ctx| ctx.to_string())), ("--kv-type", kv_type), ("--quantize", quantize)]
        {
            if let Some(value) = value {
                command.arg(name).arg(value);
            }
        }
        let run = tokio::task::spawn_blocking(move || run_bounded(&mut command, INSPECT, 64 << 10)).await;
        let failed = |what: String| {
            ErrorBody::new(ErrorCode::ModelLoadFailed, format!("cannot learn what {model} needs: {what}"))
        };
        let (code, bytes) = match run {
            Ok(Ok(done)) => done,
            Ok(Err(error)) => return Err(failed(error.to_string())),
            Err(error) => return Err(failed(error.to_string())),
        };
        if code != Some(0) {
            return Err(
                serde_json::from_slice::<ErrorBody>(&bytes).unwrap_or_else(|_| failed(format!("exit code {code:?}")))
            );
        }
        serde_json::from_slice(&bytes).map_err(|error| failed(error.to_string()))
    }

    /// Workers of a device that are not gone.
    fn on(&self, device: &Device) -> impl Iterator<Item = Process> + use<> {
        let id = device.id.clone();
        let list = self.supervisor.list().into_iter();
        list.filter(move |process| process.device == id && process.state != ProcessState::Exited)
    }

    /// Free memory less what is reserved and not yet in use; on the CPU no more than what models may have of it.
    fn free(&self, device: &Device) -> u64 {
        let found = self.devices.list().into_iter().find(|found| found.id == device.id);
        let measured = found.map_or(0, |found| found.memory_free);
        let shares: Vec<Share> = self.on(device).map(|process| Share::of(&process, device.kind)).collect();
        let free = measured.saturating_sub(shares.iter().map(Share::not_taken).sum());
        match self.cpu_memory {
            Some(limit) if device.kind == DeviceKind::Cpu => {
                free.min(limit.saturating_sub(shares.iter().map(Share::all).sum()))
            }
            _ => free,
        }
    }

    /// What workers have of a device.
    fn held(&self, device: &Device) -> Vec<Held> {
        let held = |process: Process| Held {
            bytes: Share::of(&process, device.kind).all(),
            worker_id: process.worker_id,
            model: process.model,
        };
        self.on(device).map(held).collect()
    }
}

/// The refusal of a load that needs more than is free, with what of it would fit.
pub(crate) fn too_large(rooms: &[Room]) -> ErrorBody {
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    let able: Vec<(&Room, &LoadNeeds)> = rooms.iter().filter_map(|room| Some((room, room.needs.as_ref()?))).collect();
    let lines: Vec<String> = able
        .iter()
        .map(|(room, needs)| {
            format!(
                "{} has {} MiB free and the load needs at least {} MiB",
                room.device,
                room.free >> 20,
                mib(needs.least)
            )
        })
        .collect();
    let fitting: Vec<&WouldFit> = able.iter().flat_map(|(room, _)| &room.would_fit).collect();
    let hint = match fitting.first() {
        Some(way) => format!("with {} it needs {} MiB, which fits", way.flags, mib(way.needed)),
        None => {
            "free memory, or take a smaller model; with fewer bits and a short context it does not fit either".into()
        }
    };
    let needed = able.iter().map(|(_, needs)| needs.least).min().unwrap_or(0);
    let free = able.iter().map(|(room, _)| room.free).max().unwrap_or(0);
    ErrorBody::new(ErrorCode::InsufficientMemory, lines.join("; "))
        .with_hint(hint)
        .with_details(json!({ "needed": needed, "free": free, "would_fit": fitting }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_of_a_process_is_its_own() {
        let own = std::hint::black_box(vec![1u8; 32 << 20]);
        assert!(anonymous(std::process::id()) >= own.len() as u64);
        assert_eq!(anonymous(u32::MAX), 0);
    }

    #[test]
    fn a_load_gets_all_it_asks_for_or_less_kv_or_nothing() {
        let needs = LoadNeeds { total: 1000, least: 300, kv: 800, ..LoadNeeds::default() };
        let gets = |reserved, kv| Some(Granted { reserved, kv });
        assert_eq!(granted(&needs, 1000), gets(1000, None));
        assert_eq!(granted(&needs, 999), gets(937, Some(737)));
        assert_eq!(granted(&needs, 310), gets(300, Some(100)));
        assert_eq!(granted(&needs, 299), None);
        // Weights and working memory are the same 200 bytes each time.
        for free in 300..1100 {
            let got = granted(&needs, free).unwrap();
            assert!(got.reserved <= free && got.reserved == 200 + got.kv.unwrap_or(800), "{free}: {got:?}");
        }
    }
}
