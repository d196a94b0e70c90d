//! `PromptTrie` and `PromptTrieResult`.

use super::models::{Model, Models};
use super::tokens::Tokens;
use crate::store::{Match, Radix};
use pyo3::exceptions::{PyKeyError, PyRuntimeError};
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{IntoPyDict, PyDict, PyTuple, PyType};
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

static RESULT: PyOnceLock<Py<PyType>> = PyOnceLock::new();

/// Makes the class of search results, a dataclass as in mlx-lm, and adds it and the trie to the module.
pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = module.py();
    let fields = ["model", "exact", "shorter", "longer", "common_prefix"];
    let body = [("__doc__", "What a PromptTrie has for a query.")].into_py_dict(py)?;
    let keywords = [("namespace", body)].into_py_dict(py)?;
    let class =
        py.import("dataclasses")?.call_method("make_dataclass", ("PromptTrieResult", fields), Some(&keywords))?;
    class.setattr("__module__", "mlxrs_py.cache")?;
    module.add("PromptTrieResult", &class)?;
    // A second import of the module in one process keeps the first type.
    let _ = RESULT.set(py, class.cast_into::<PyType>()?.unbind());
    module.add_class::<PyPromptTrie>()
}

/// Values under sequences of tokens, per model.
#[pyclass(name = "PromptTrie", module = "mlxrs_py.cache", subclass, dict, weakref, frozen)]
pub(super) struct PyPromptTrie {
    /// Locked only while Rust runs: no Python code, destructors of values included, runs inside.
    inner: Mutex<Tries>,
}

#[derive(Default)]
struct Tries {
    models: Models,
    trees: HashMap<u64, Radix<Py<PyAny>>>,
}

impl Tries {
    /// Takes out a model of which nothing is left.
    fn prune(&mut self, id: u64) -> Option<Py<PyAny>> {
        if !self.trees.get(&id)?.is_empty() {
            return None;
        }
        self.trees.remove(&id);
        self.models.remove(id)
    }
}

impl PyPromptTrie {
    fn lock(&self) -> MutexGuard<'_, Tries> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find<'a, 'py>(&self, model: &'a Bound<'py, PyAny>) -> PyResult<Model<'a, 'py>> {
        Model::find(model, |hash| self.lock().models.candidates(model.py(), hash))
    }

    /// The model's number, or the KeyError that `op` raises for a model of which nothing is stored.
    fn known(&self, op: &'static str, model: &Bound<'_, PyAny>) -> PyResult<u64> {
        self.find(model)?
            .id
            .ok_or_else(|| PyKeyError::new_err(format!("{op}: expected a model in the trie, got another")))
    }
}

/// Pickled: model, tokens and value of each entry, and attributes.
type State<'py> = (Vec<(Bound<'py, PyAny>, Tokens, Py<PyAny>)>, Bound<'py, PyDict>);

fn absent(op: &'static str, n_tokens: usize) -> PyErr {
    PyKeyError::new_err(format!("{op}: expected tokens that are stored, got {n_tokens} that are not"))
}

#[pymethods]
impl PyPromptTrie {
    #[new]
    #[pyo3(signature = (*_args, **_kwargs), text_signature = "()")]
    fn py_new(_args: &Bound<'_, PyTuple>, _kwargs: Option<&Bound<'_, PyDict>>) -> Self {
        Self { inner: Mutex::default() }
    }

    fn __init__(&self) {
        // A second call empties it. The old trees are dropped after the lock.
        let _old = std::mem::take(&mut *self.lock());
    }

    /// Stores `value` and gives the one that lay there, or None.
    fn add(&self, model: &Bound<'_, PyAny>, tokens: Tokens, value: Py<PyAny>) -> PyResult<Option<Py<PyAny>>> {
        loop {
            let model = self.find(model)?;
            let mut inner = self.lock();
            // Python code of the model may have changed the table meanwhile: look again.
            if let Some(id) = inner.models.enter(&model) {
                return Ok(inner.trees.entry(id).or_default().insert(&tokens.0, value).1);
            }
        }
    }

    /// The value under `tokens`.
    fn get(&self, py: Python<'_>, model: &Bound<'_, PyAny>, tokens: Tokens) -> PyResult<Py<PyAny>> {
        let op = "PromptTrie.get";
        let id = self.known(op, model)?;
        let inner = self.lock();
        let value = inner.trees.get(&id).and_then(|tree| tree.get(tree.find(&tokens.0)?));
        value.map(|value| value.clone_ref(py)).ok_or_else(|| absent(op, tokens.0.len()))
    }

    /// Takes out the value under `tokens`.
    fn pop(&self, model: &Bound<'_, PyAny>, tokens: Tokens) -> PyResult<Py<PyAny>> {
        let op = "PromptTrie.pop";
        let id = self.known(op, model)?;
        let mut inner = self.lock();
        let value = inner.trees.get_mut(&id).and_then(|tree| tree.remove(tree.find(&tokens.0)?));
        let model = inner.prune(id);
        drop(inner);
        drop(model);
        value.ok_or_else(|| absent(op, tokens.0.len()))
    }

    /// Takes out the values on all proper prefixes of `tokens`.
    fn pop_prefixes(&self, model: &Bound<'_, PyAny>, tokens: Tokens) -> PyResult<Vec<(usize, Py<PyAny>)>> {
        let op = "PromptTrie.pop_prefixes";
        let id = self.known(op, model)?;
        let taken = self.lock().trees.get_mut(&id).and_then(|tree| tree.remove_prefixes(&tokens.0));
        taken.ok_or_else(|| absent(op, tokens.0.len()))
    }

    /// What is stored under `tokens`, or nearest to them.
    fn search<'py>(&self, model: &Bound<'py, PyAny>, tokens: Tokens) -> PyResult<Bound<'py, PyAny>> {
        let py = model.py();
        let id = self.find(model)?.id;
        let (found, longer) = {
            let inner = self.lock();
            let tree = id.and_then(|id| inner.trees.get(&id));
            let found = tree.map_or_else(Match::default, |tree| tree.search(&tokens.0));
            (found, found.longer.and_then(|key| Some(tree?.tokens(key))))
        };
        let exact = found.exact.map(|_| &tokens.0[..]);
        let shorter = found.shorter.map(|(_, n_tokens)| &tokens.0[..n_tokens]);
        let class = RESULT.get(py).ok_or_else(|| PyRuntimeError::new_err("mlxrs_py._core is not set up"))?;
        class.bind(py).call1((model, exact, shorter, longer, found.common_prefix))
    }

    fn __reduce_ex__<'py>(slf: &Bound<'py, Self>, _protocol: i32) -> PyResult<Bound<'py, PyTuple>> {
        let py = slf.py();
        let entries = {
            let inner = slf.get().lock();
            let trees = inner.trees.iter().filter_map(|(&id, tree)| Some((inner.models.get(py, id)?, tree)));
            let entries = trees.flat_map(|(model, tree)| {
                tree.iter()
                    .map(|(key, value)| (model.clone_ref(py), tree.tokens(key), value.clone_ref(py)))
                    .collect::<Vec<_>>()
            });
            entries.collect::<Vec<_>>()
        };
        let make = py.import("copyreg")?.getattr("__newobj__")?;
        (make, (slf.get_type(),), (entries, slf.getattr("__dict__")?)).into_pyobject(py)
    }

    fn __setstate__(slf: &Bound<'_, Self>, state: State<'_>) -> PyResult<()> {
        let (entries, attributes) = state;
        for (model, tokens, value) in entries {
            slf.get().add(&model, tokens, value)?;
        }
        slf.getattr("__dict__")?.call_method1("update", (attributes,)).map(drop)
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        // Nobody holds the lock while Python, and so its collector, can run.
        let Ok(inner) = self.inner.try_lock() else { return Ok(()) };
        inner.models.traverse(&visit)?;
        inner.trees.values().flat_map(Radix::values).try_for_each(|value| visit.call(value))
    }

    fn __clear__(&self) {
        let _old = std::mem::take(&mut *self.lock());
    }
}
