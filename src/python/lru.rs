//! `LRUPromptCache`: asks Python about the caches, and the core which of them stay.

use super::models::{Model, Models};
use super::tokens::Tokens;
use crate::store::{Found, Gone, Kind, Limits, Nearest, Prompts};
use pyo3::exceptions::{PyKeyError, PyOverflowError};
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PySlice, PyString, PyTuple};
use std::sync::{Mutex, MutexGuard, PoisonError};

const DEFAULT: Limits = Limits { n_prompts: 10, n_bytes: 1 << 63 };

/// Prompt caches of conversations, by their tokens. `LRUPromptCache(max_size=10, max_bytes=1 << 63)`
#[pyclass(name = "LRUPromptCache", module = "mlxrs_py.cache", subclass, dict, weakref, frozen)]
pub(super) struct PyLruPromptCache {
    /// Locked only while Rust runs: no Python code, destructors of caches included, runs inside.
    inner: Mutex<Inner>,
}

struct Inner {
    models: Models,
    prompts: Prompts<Py<PyAny>>,
}

impl Inner {
    fn new(limits: Limits) -> Self {
        Self { models: Models::default(), prompts: Prompts::new(limits) }
    }
}

/// A copy of a stored prompt cache, of so many tokens.
struct Hit<'py> {
    id: u64,
    /// Bytes that the stored one now has.
    n_bytes: u64,
    copy: Bound<'py, PyAny>,
    n_tokens: usize,
}

impl PyLruPromptCache {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes something and makes the limits hold. What goes is dropped after the lock.
    fn change<T>(&self, change: impl FnOnce(&mut Inner, &mut Gone<Py<PyAny>>) -> T) -> T {
        let mut gone = Gone::default();
        let mut inner = self.lock();
        let result = change(&mut inner, &mut gone);
        inner.prompts.settle(&mut gone);
        let models: Vec<_> = gone.models.iter().filter_map(|&id| inner.models.remove(id)).collect();
        drop(inner);
        drop((gone, models));
        result
    }

    fn find<'a, 'py>(&self, model: &'a Bound<'py, PyAny>) -> PyResult<Model<'a, 'py>> {
        Model::find(model, |hash| self.lock().models.candidates(model.py(), hash))
    }

    /// What all entries measure now: caches are stored, not copied, and whoever put one in may have used it further.
    fn sizes(&self, py: Python<'_>) -> PyResult<Vec<(u64, u64)>> {
        let entries: Vec<_> = self.lock().prompts.iter().map(|(id, _, _, cache)| (id, cache.clone_ref(py))).collect();
        entries.into_iter().map(|(id, cache)| Ok((id, measure(cache.bind(py))?))).collect()
    }

    /// Counts all entries anew, makes the limits hold, and reads something.
    fn counted<T>(&self, py: Python<'_>, read: impl FnOnce(&Prompts<Py<PyAny>>) -> T) -> PyResult<T> {
        let sizes = self.sizes(py)?;
        self.change(|inner, _| resize(&mut inner.prompts, &sizes));
        Ok(read(&self.lock().prompts))
    }

    /// Copies the best entry there is, trimmed to what it has in common with the query.
    fn choose<'py>(&self, py: Python<'py>, model: u64, tokens: &[i64]) -> PyResult<Option<Hit<'py>>> {
        let (exact, shorter, longer, common_prefix) = {
            let inner = self.lock();
            let Nearest { exact, shorter, longer, common_prefix } = inner.prompts.nearest(model, tokens);
            let entry = |found: Option<Found>| {
                let Found { id, n_tokens } = found?;
                Some((id, inner.prompts.get(id)?.clone_ref(py).into_bound(py), n_tokens))
            };
            (entry(exact), entry(shorter), entry(longer), common_prefix)
        };
        let whole = |(id, cache, n_tokens): (u64, Bound<'py, PyAny>, usize)| {
            Ok(Hit { id, n_bytes: measure(&cache)?, copy: deepcopy(&cache)?, n_tokens })
        };
        if let Some(exact) = exact {
            return whole(exact).map(Some);
        }
        if let Some((id, cache, n_tokens)) = longer
            && common_prefix > shorter.as_ref().map_or(0, |&(_, _, n_tokens)| n_tokens)
        {
            // One token is left for the model, which must give logits.
            let kept = common_prefix.min(tokens.len() - 1);
            if let Some(copy) = trimmed(&cache, n_tokens - kept)? {
                return Ok(Some(Hit { id, n_bytes: measure(&cache)?, copy, n_tokens: kept }));
            }
        }
        shorter.map(whole).transpose()
    }

    /// Stores a prompt cache that has been measured.
    fn put(
        &self,
        model: &Bound<'_, PyAny>,
        tokens: &[i64],
        (kind, n_bytes, cache): (Kind, u64, &Bound<'_, PyAny>),
        replaces_prefixes: bool,
        sizes: &[(u64, u64)],
    ) -> PyResult<()> {
        loop {
            let model = self.find(model)?;
            let done = self.change(|inner, gone| {
                // Python code of the model may have changed the table meanwhile: look again.
                let Some(id) = inner.models.enter(&model) else { return false };
                resize(&mut inner.prompts, sizes);
                let entry = (kind, n_bytes, cache.clone().unbind());
                inner.prompts.insert(id, tokens, entry, replaces_prefixes, gone);
                true
            });
            if done {
                return Ok(());
            }
        }
    }
}

#[pymethods]
impl PyLruPromptCache {
    #[new]
    #[pyo3(signature = (*_args, **_kwargs), text_signature = "(max_size=10, max_bytes=9223372036854775808)")]
    fn py_new(_args: &Bound<'_, PyTuple>, _kwargs: Option<&Bound<'_, PyDict>>) -> Self {
        Self { inner: Mutex::new(Inner::new(DEFAULT)) }
    }

    #[pyo3(signature = (max_size = Cap(DEFAULT.n_prompts), max_bytes = Cap(DEFAULT.n_bytes)))]
    fn __init__(&self, max_size: Cap, max_bytes: Cap) {
        // A second call empties it. The old entries are dropped after the lock.
        let new = Inner::new(Limits { n_prompts: max_size.0, n_bytes: max_bytes.0 });
        let _old = std::mem::replace(&mut *self.lock(), new);
    }

    /// Entries that may be stored.
    #[getter]
    fn max_size(&self) -> u64 {
        self.lock().prompts.limits().n_prompts
    }

    #[setter]
    fn set_max_size(&self, max_size: Cap) {
        self.change(|inner, _| {
            inner.prompts.set_limits(Limits { n_prompts: max_size.0, ..inner.prompts.limits() });
        });
    }

    /// Bytes that all entries may have.
    #[getter]
    fn max_bytes(&self) -> u64 {
        self.lock().prompts.limits().n_bytes
    }

    #[setter]
    fn set_max_bytes(&self, py: Python<'_>, max_bytes: Cap) -> PyResult<()> {
        let sizes = self.sizes(py)?;
        self.change(|inner, _| {
            resize(&mut inner.prompts, &sizes);
            inner.prompts.set_limits(Limits { n_bytes: max_bytes.0, ..inner.prompts.limits() });
        });
        Ok(())
    }

    fn __len__(&self) -> usize {
        self.lock().prompts.len()
    }

    /// Bytes of all entries, counted anew.
    #[getter]
    fn nbytes(&self, py: Python<'_>) -> PyResult<u128> {
        self.counted(py, Prompts::n_bytes)
    }

    /// A copy of the prompt cache that covers most of `tokens`, or None, and the tokens that it does not cover.
    fn fetch_nearest_cache<'py>(
        &self,
        model: &Bound<'py, PyAny>,
        tokens: &Bound<'py, PyAny>,
    ) -> PyResult<(Option<Bound<'py, PyAny>>, Bound<'py, PyAny>)> {
        let py = model.py();
        let Tokens(query) = tokens.extract()?;
        let hit = match self.find(model)?.id {
            Some(id) => self.choose(py, id, &query)?,
            None => None,
        };
        let Some(Hit { id, n_bytes, copy, n_tokens }) = hit else { return Ok((None, tokens.clone())) };
        let rest = tokens.get_item(PySlice::new(py, n_tokens as isize, query.len() as isize, 1))?;
        self.change(|inner, _| {
            inner.prompts.touch(id);
            inner.prompts.resize(id, n_bytes);
        });
        Ok((Some(copy), rest))
    }

    /// Stores a prompt cache under its tokens.
    #[pyo3(signature = (model, tokens, prompt_cache, *, cache_type = Type(Kind::Assistant)))]
    #[pyo3(text_signature = "($self, model, tokens, prompt_cache, *, cache_type='assistant')")]
    fn insert_cache(
        &self,
        py: Python<'_>,
        model: &Bound<'_, PyAny>,
        tokens: Tokens,
        prompt_cache: &Bound<'_, PyAny>,
        cache_type: Type,
    ) -> PyResult<()> {
        let n_bytes = measure(prompt_cache)?;
        let trimmable = is_trimmable(prompt_cache)?;
        let sizes = self.sizes(py)?;
        self.put(model, &tokens.0, (cache_type.0, n_bytes, prompt_cache), trimmable, &sizes)
    }

    /// Takes out entries until at most so many, and so many bytes, are left.
    #[pyo3(signature = (*, n_sequences = None, n_bytes = None))]
    fn trim_to(&self, py: Python<'_>, n_sequences: Option<Cap>, n_bytes: Option<Cap>) -> PyResult<()> {
        let cap = |cap: Option<Cap>| cap.map_or(u64::MAX, |cap| cap.0);
        let limits = Limits { n_prompts: cap(n_sequences), n_bytes: cap(n_bytes) };
        let sizes = self.sizes(py)?;
        self.change(|inner, gone| {
            resize(&mut inner.prompts, &sizes);
            inner.prompts.evict(limits, gone);
        });
        Ok(())
    }

    /// Number and bytes of the entries of each kind, counted anew.
    fn stats_by_type<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = self.counted(py, |prompts| Kind::ALL.map(|kind| (kind.name(), prompts.stats(kind))))?;
        let by_type = PyDict::new(py);
        for (name, (n_sequences, n_bytes)) in stats {
            let of_type = PyDict::new(py);
            of_type.set_item("n_sequences", n_sequences)?;
            of_type.set_item("n_bytes", n_bytes)?;
            by_type.set_item(name, of_type)?;
        }
        Ok(by_type)
    }

    fn __reduce_ex__<'py>(slf: &Bound<'py, Self>, _protocol: i32) -> PyResult<Bound<'py, PyTuple>> {
        let py = slf.py();
        let (limits, entries) = {
            let inner = slf.get().lock();
            let entries = inner.prompts.iter().filter_map(|(id, kind, model, cache)| {
                let model = inner.models.get(py, model)?;
                Some((model, inner.prompts.tokens(id)?, kind.name(), cache.clone_ref(py)))
            });
            (inner.prompts.limits(), entries.collect::<Vec<_>>())
        };
        let make = py.import("copyreg")?.getattr("__newobj__")?;
        let state = (limits.n_prompts, limits.n_bytes, entries, slf.getattr("__dict__")?);
        (make, (slf.get_type(),), state).into_pyobject(py)
    }

    fn __setstate__(slf: &Bound<'_, Self>, state: State<'_>) -> PyResult<()> {
        let (max_size, max_bytes, entries, attributes) = state;
        slf.get().__init__(max_size, max_bytes);
        for (model, tokens, kind, cache) in &entries {
            let entry = (kind.0, measure(cache)?, cache);
            slf.get().put(model, &tokens.0, entry, false, &[])?;
        }
        slf.getattr("__dict__")?.call_method1("update", (attributes,)).map(drop)
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        // Nobody holds the lock while Python, and so its collector, can run.
        let Ok(inner) = self.inner.try_lock() else { return Ok(()) };
        inner.models.traverse(&visit)?;
        inner.prompts.iter().try_for_each(|(_, _, _, cache)| visit.call(cache))
    }

    fn __clear__(&self) {
        let mut inner = self.lock();
        let new = Inner::new(inner.prompts.limits());
        let old = std::mem::replace(&mut *inner, new);
        drop(inner);
        drop(old);
    }
}

/// Pickled: the limits, model, tokens, kind and caches of each entry, and attributes.
type State<'py> = (Cap, Cap, Vec<(Bound<'py, PyAny>, Tokens, Type, Bound<'py, PyAny>)>, Bound<'py, PyDict>);

/// A limit: any int, taken into the range of 64 bits.
struct Cap(u64);

impl<'a, 'py> FromPyObject<'a, 'py> for Cap {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        match object.extract::<u64>() {
            Err(error) if error.is_instance_of::<PyOverflowError>(object.py()) => {
                Ok(Self(if object.lt(0)? { 0 } else { u64::MAX }))
            }
            cap => cap.map(Self),
        }
    }
}

/// A kind under mlx-lm's name; KeyError for another, as in mlx-lm.
struct Type(Kind);

impl<'a, 'py> FromPyObject<'a, 'py> for Type {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        let name = object.cast::<PyString>().ok().map(|name| name.to_str().map(ToOwned::to_owned)).transpose()?;
        let kind = name.and_then(|name| Kind::from_name(&name));
        kind.map(Self).ok_or_else(|| PyKeyError::new_err((object.to_owned().unbind(),)))
    }
}

fn resize(prompts: &mut Prompts<Py<PyAny>>, sizes: &[(u64, u64)]) {
    for &(id, n_bytes) in sizes {
        prompts.resize(id, n_bytes);
    }
}

/// Bytes of all caches of a prompt cache.
fn measure(prompt_cache: &Bound<'_, PyAny>) -> PyResult<u64> {
    prompt_cache
        .try_iter()?
        .try_fold(0_u64, |total, cache| Ok(total.saturating_add(cache?.getattr("nbytes")?.extract()?)))
}

fn is_trimmable(prompt_cache: &Bound<'_, PyAny>) -> PyResult<bool> {
    for cache in prompt_cache.try_iter()? {
        if !cache?.call_method0("is_trimmable")?.is_truthy()? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Shares the memory of arrays until one of the two writes.
fn deepcopy<'py>(prompt_cache: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    prompt_cache.py().import("copy")?.call_method1("deepcopy", (prompt_cache,))
}

/// A copy without the newest `n_tokens`; None if the caches cannot do that, all of them alike.
fn trimmed<'py>(prompt_cache: &Bound<'py, PyAny>, n_tokens: usize) -> PyResult<Option<Bound<'py, PyAny>>> {
    if !is_trimmable(prompt_cache)? {
        return Ok(None);
    }
    let copy = deepcopy(prompt_cache)?;
    let mut first: Option<Bound<'py, PyAny>> = None;
    for cache in copy.try_iter()? {
        let trimmed = cache?.call_method1("trim", (n_tokens,))?;
        // Chunked caches give back no more than their chunk.
        if !first.get_or_insert_with(|| trimmed.clone()).eq(&trimmed)? {
            return Ok(None);
        }
    }
    Ok(Some(copy))
}
