//! The prompt store: converts tokens and caches; `python/mlxrs_py/store/` is its face.

use super::base::{PyCache, own};
use super::foreign::adopt_one;
use super::list::{PyCacheList, children};
use super::tokens::Tokens;
use crate::cache::Cache;
use crate::error::Error;
use crate::store::prompt_store::{DiskState, Listed, Options, PromptStore, PutHandle, RecordKind, Space, Tier};
use crate::store::view::{Recorder, View};
use pyo3::exceptions::{PyOverflowError, PyTimeoutError, PyTypeError};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::num::NonZero;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Token ids of 32 bits, as stores keep them.
pub(super) struct Ids(pub(super) Vec<u32>);

impl<'a, 'py> FromPyObject<'a, 'py> for Ids {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        let tokens: Tokens = object.extract()?;
        let ids = tokens.0.into_iter().map(|token| {
            u32::try_from(token)
                .map_err(|_| PyOverflowError::new_err(format!("expected token ids from 0 to 2^32 - 1, got {token}")))
        });
        Ok(Self(ids.collect::<PyResult<_>>()?))
    }
}

/// The caches without children, in order: objects of ours, or adopted ones of mlx-lm's.
pub(super) fn leaves<'py>(caches: &Bound<'py, PyAny>) -> PyResult<Vec<Bound<'py, PyAny>>> {
    let mut found = Vec::new();
    for cache in caches.try_iter()? {
        add_leaves(adopt_one(cache?)?, &mut found)?;
    }
    Ok(found)
}

fn add_leaves<'py>(cache: Bound<'py, PyAny>, found: &mut Vec<Bound<'py, PyAny>>) -> PyResult<()> {
    if let Ok(list) = cache.cast::<PyCacheList>() {
        return children(list).into_iter().try_for_each(|child| add_leaves(adopt_one(child)?, found));
    }
    if own(&cache).is_none() {
        let class = cache.get_type().qualname()?;
        return Err(PyTypeError::new_err(format!("expected caches of mlxrs_py or mlx-lm, got {class}")));
    }
    found.push(cache);
    Ok(())
}

/// What the leaves hold now; arrays are shared.
pub(super) fn contents(leaves: &[Bound<'_, PyAny>]) -> PyResult<Vec<Cache>> {
    leaves.iter().map(|leaf| Ok(leaf.cast::<PyCache>()?.get().lock()?.clone())).collect()
}

/// Prompts on disk and in memory; the core of `mlxrs_py.PromptStore`.
#[pyclass(name = "PromptStore", module = "mlxrs_py._core", frozen)]
pub(super) struct PyPromptStore(Arc<PromptStore>);

#[pymethods]
impl PyPromptStore {
    #[new]
    #[pyo3(signature = (path, *, ram_bytes, disk_bytes, block_tokens, write_bytes_per_day, compression, read_only, allow_network_fs))]
    #[expect(clippy::too_many_arguments, reason = "keyword arguments of a Python function")]
    fn py_new(
        py: Python<'_>,
        path: Option<PathBuf>,
        ram_bytes: u64,
        disk_bytes: Option<u64>,
        block_tokens: usize,
        write_bytes_per_day: Option<u64>,
        compression: Option<&str>,
        read_only: bool,
        allow_network_fs: bool,
    ) -> PyResult<Self> {
        crate::ffi::check_not_forked("PromptStore")?;
        let compression = compression.map(str::parse).transpose()?;
        let options = Options {
            path,
            ram_bytes,
            disk_bytes,
            block_tokens,
            write_bytes_per_day,
            compression,
            read_only,
            allow_network_fs,
        };
        Ok(Self(Arc::new(py.detach(|| PromptStore::open(options))?)))
    }

    /// Waits for what is being written, and closes.
    fn close(&self, py: Python<'_>) {
        py.detach(|| self.0.close());
    }

    /// A view of the model that `fingerprint` stands for, whose fresh caches are `caches`.
    fn view(&self, fingerprint: &[u8], caches: &Bound<'_, PyAny>) -> PyResult<PyView> {
        let leaves = contents(&leaves(caches)?)?;
        Ok(PyView(Mutex::new(View::new(Arc::clone(&self.0), fingerprint, leaves)?)))
    }

    /// Numbers of the store.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = py.detach(|| self.0.stats());
        let found = PyDict::new(py);
        let disk = match stats.disk {
            DiskState::Off => "off".to_owned(),
            DiskState::On => "on".to_owned(),
            DiskState::ReadOnly => "read-only".to_owned(),
            DiskState::Broken(reason) => format!("broken: {reason}"),
        };
        found.set_item("disk", disk)?;
        found.set_item("disk_records", stats.disk_records)?;
        found.set_item("disk_bytes", stats.disk_bytes)?;
        found.set_item("disk_limit", stats.disk_limit)?;
        found.set_item("ram_records", stats.ram_records)?;
        found.set_item("ram_bytes", stats.ram_bytes)?;
        found.set_item("ram_limit", stats.ram_limit)?;
        found.set_item("queued_records", stats.n_queued)?;
        found.set_item("queued_bytes", stats.queued_bytes)?;
        found.set_item("pinned", stats.n_pinned)?;
        found.set_item("hits", stats.n_hits)?;
        found.set_item("misses", stats.n_misses)?;
        found.set_item("written", stats.n_written)?;
        found.set_item("written_bytes", stats.written_bytes)?;
        found.set_item("written_today", stats.written_today)?;
        found.set_item("write_limit", stats.write_limit)?;
        found.set_item("evicted", stats.n_evicted)?;
        found.set_item("quarantined", stats.n_quarantined)?;
        found.set_item("index_rebuilds", stats.n_rebuilds)?;
        Ok(found)
    }

    /// All records, parents before their children.
    fn list<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyDict>>> {
        let record = |listed: Listed| {
            let found = PyDict::new(py);
            let record = &listed.record;
            found.set_item("id", record.id.to_string())?;
            found.set_item("parent", listed.parent.to_string())?;
            found.set_item("space", record.space().to_string())?;
            found.set_item("kind", if record.kind == RecordKind::Rows { "rows" } else { "state" })?;
            found.set_item("start", record.start)?;
            found.set_item("end", record.end)?;
            found.set_item("bytes", record.n_bytes)?;
            found.set_item("hits", listed.hits)?;
            found.set_item("used", listed.last_used)?;
            found.set_item("pinned", listed.is_pinned)?;
            found.set_item("tier", tier_name(record.tier))?;
            Ok(found)
        };
        py.detach(|| self.0.list()).into_iter().map(record).collect()
    }

    /// Pins or unpins the record whose name begins with `id`, and those before it; gives how many.
    fn pin_id(&self, py: Python<'_>, id: &str, pins: bool) -> PyResult<usize> {
        let op = if pins { "PromptStore.pin" } else { "PromptStore.unpin" };
        let change = || {
            let all = self.0.list();
            let (space, tokens) = path_to(op, &all, id)?;
            if pins { self.0.pin(&space, &tokens) } else { self.0.unpin(&space, &tokens) }
        };
        Ok(py.detach(change)?)
    }

    /// Evicts until at most `target` bytes are left; gives the bytes that were freed.
    #[pyo3(signature = (target = None))]
    fn prune(&self, py: Python<'_>, target: Option<u64>) -> PyResult<u64> {
        Ok(py.detach(|| self.0.prune(target))?)
    }

    /// Reads every record; with `repair` what is damaged is set aside and the index made right.
    fn verify<'py>(&self, py: Python<'py>, repair: bool) -> PyResult<Bound<'py, PyDict>> {
        let verified = py.detach(|| self.0.verify(repair))?;
        let found = PyDict::new(py);
        found.set_item("sound", verified.faults.is_empty())?;
        found.set_item("records", verified.n_checked)?;
        found.set_item("bytes", verified.n_bytes)?;
        found.set_item("faults", verified.faults)?;
        found.set_item("repaired", verified.is_repaired)?;
        Ok(found)
    }

    /// Removes every record; pinned ones too.
    fn clear(&self, py: Python<'_>) -> PyResult<()> {
        Ok(py.detach(|| self.0.clear())?)
    }

    /// A measured rate, such as bytes per second of restores.
    fn rate(&self, py: Python<'_>, name: &str) -> Option<f64> {
        py.detach(|| self.0.rate(name))
    }

    /// Takes a measured rate into its average.
    fn note_rate(&self, py: Python<'_>, name: &str, value: f64) {
        py.detach(|| self.0.note_rate(name, value));
    }
}

/// The space and all tokens up to the end of the one record whose name begins with `id`.
fn path_to(op: &'static str, all: &[Listed], id: &str) -> Result<(Space, Vec<u32>), Error> {
    let mut found = all.iter().filter(|listed| listed.record.id.to_string().starts_with(id));
    let (Some(only), None) = (found.next(), found.next()) else {
        return Err(Error::value(op, "the beginning of one record's id", id));
    };
    let mut path = vec![only];
    while let Some(parent) = all.iter().find(|listed| listed.record.id == path[path.len() - 1].parent) {
        path.push(parent);
    }
    let tokens = path.iter().rev().flat_map(|listed| listed.record.tokens()).copied().collect();
    Ok((*only.record.space(), tokens))
}

/// One model's view of a store; the core of `mlxrs_py.store.View`.
#[pyclass(name = "StoreView", module = "mlxrs_py._core", frozen)]
pub(super) struct PyView(Mutex<View>);

impl PyView {
    /// The view, for as long as a call needs it: its fresh caches are cheap to clone, and belong to one thread.
    pub(super) fn view(&self) -> View {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[pymethods]
impl PyView {
    /// Tokens that can be restored, bytes to read, "ram" or "disk" or None, and whether that is exact.
    fn lookup(&self, py: Python<'_>, tokens: Ids, step: u32, exact: bool) -> (usize, u64, Option<&'static str>, bool) {
        let view = self.view();
        let found = py.detach(move || view.lookup(&tokens.0, step, exact));
        (found.n_tokens, found.n_bytes, found.tier.map(tier_name), found.is_exact)
    }

    /// Fills fresh `caches` with what the store has of `tokens`; gives the tokens, the bytes read and whether that is
    /// exact.
    #[pyo3(signature = (tokens, caches, step, exact, threads = None))]
    fn restore(
        &self,
        py: Python<'_>,
        tokens: Ids,
        caches: &Bound<'_, PyAny>,
        step: u32,
        exact: bool,
        threads: Option<NonZero<usize>>,
    ) -> PyResult<(usize, u64, bool)> {
        crate::ffi::check_not_forked("restore")?;
        let leaves = leaves(caches)?;
        let view = self.view();
        view.check("restore", &contents(&leaves)?)?;
        let Some(restored) = py.detach(move || view.restore(&tokens.0, step, exact, threads))? else {
            return Ok((0, 0, true));
        };
        for (leaf, cache) in leaves.iter().zip(restored.leaves) {
            *leaf.cast::<PyCache>()?.get().lock()? = cache;
        }
        Ok((restored.n_tokens, restored.n_bytes, restored.is_exact))
    }

    /// Stores the prompt of a run as it grows; its first `restored` tokens came from the store.
    fn recorder(&self, restored: usize, step: u32, exact: bool) -> PyRecorder {
        PyRecorder(Mutex::new(Recorder::new(self.view(), restored, step, exact)))
    }

    /// Keeps the prompt's records from eviction; gives how many there are.
    fn pin(&self, py: Python<'_>, tokens: Ids) -> PyResult<usize> {
        let view = self.view();
        Ok(py.detach(move || view.store().pin(view.space(), &tokens.0))?)
    }

    /// Takes a pin back; gives how many records it held.
    fn unpin(&self, py: Python<'_>, tokens: Ids) -> PyResult<usize> {
        let view = self.view();
        Ok(py.detach(move || view.store().unpin(view.space(), &tokens.0))?)
    }
}

const fn tier_name(tier: Tier) -> &'static str {
    match tier {
        Tier::Ram => "ram",
        Tier::Disk => "disk",
    }
}

/// Stores the prompt of one run as it grows.
#[pyclass(name = "StoreRecorder", module = "mlxrs_py._core", frozen)]
pub(super) struct PyRecorder(Mutex<Recorder>);

#[pymethods]
impl PyRecorder {
    /// Stores what is new in `caches`, which hold exactly `tokens`.
    fn note(
        &self,
        py: Python<'_>,
        tokens: Ids,
        caches: &Bound<'_, PyAny>,
        is_last: bool,
        keep: bool,
    ) -> PyResult<Vec<PyPutHandle>> {
        crate::ffi::check_not_forked("put")?;
        let leaves = contents(&leaves(caches)?)?;
        let handles = py.detach(move || {
            let mut recorder = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            recorder.note(&tokens.0, &leaves, is_last, keep)
        })?;
        Ok(handles.into_iter().map(PyPutHandle).collect())
    }
}

/// Records on their way to the disk.
#[pyclass(name = "StorePut", module = "mlxrs_py._core", frozen)]
pub(super) struct PyPutHandle(PutHandle);

#[pymethods]
impl PyPutHandle {
    /// Waits until the records are durable; gives their number and bytes, and how many the disk has no room for.
    #[pyo3(signature = (timeout = None))]
    fn wait(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<(usize, u64, usize)> {
        // In slices, so that Ctrl-C is heard.
        let mut left = timeout.map(|seconds| Duration::from_secs_f64(seconds.clamp(0.0, 1e9)));
        loop {
            let slice = left.map_or(SLICE, |left| left.min(SLICE));
            match py.detach(|| self.0.wait(Some(slice)))? {
                Some(report) => return Ok((report.n_written, report.n_bytes, report.n_in_memory)),
                None => py.check_signals()?,
            }
            if let Some(rest) = &mut left {
                *rest = rest.saturating_sub(slice);
                if rest.is_zero() {
                    return Err(PyTimeoutError::new_err("put: the records are not written yet"));
                }
            }
        }
    }

    /// True once nothing is left to wait for.
    fn done(&self) -> bool {
        self.0.is_done()
    }
}

const SLICE: Duration = Duration::from_millis(50);

/// Adds the classes to the module.
pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PyPromptStore>()?;
    module.add_class::<PyView>()?;
    module.add_class::<PyRecorder>()?;
    module.add_class::<PyPutHandle>()
}
