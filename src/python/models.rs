//! Models as keys: any hashable Python objects. Hashing and comparing them is Python code, so it happens between two
//! looks at the table, never while the table is locked; taking a model out needs neither.

use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use std::collections::HashMap;

/// Models and their numbers, which are never given twice.
#[derive(Default)]
pub(super) struct Models {
    by_hash: HashMap<isize, Vec<(u64, Py<PyAny>)>>,
    hashes: HashMap<u64, isize>,
    n_entered: u64,
}

/// A model that was looked for.
pub(super) struct Model<'a, 'py> {
    object: &'a Bound<'py, PyAny>,
    hash: isize,
    /// Numbers of the models that it was compared with.
    seen: Vec<u64>,
    /// Its number, if it was there.
    pub id: Option<u64>,
}

impl<'a, 'py> Model<'a, 'py> {
    /// Looks for `object` among those that `candidates` gives for its hash. Errors are Python's own.
    pub(super) fn find(
        object: &'a Bound<'py, PyAny>,
        candidates: impl FnOnce(isize) -> Vec<(u64, Py<PyAny>)>,
    ) -> PyResult<Self> {
        let hash = object.hash()?;
        let candidates = candidates(hash);
        let mut id = None;
        for (number, candidate) in &candidates {
            if candidate.is(object) || candidate.bind(object.py()).eq(object)? {
                id = Some(*number);
                break;
            }
        }
        Ok(Self { object, hash, seen: candidates.into_iter().map(|(number, _)| number).collect(), id })
    }
}

impl Models {
    /// The models of one hash.
    pub(super) fn candidates(&self, py: Python<'_>, hash: isize) -> Vec<(u64, Py<PyAny>)> {
        let models = self.by_hash.get(&hash).into_iter().flatten();
        models.map(|(id, model)| (*id, model.clone_ref(py))).collect()
    }

    /// The number of `model`, which is added if it is new; None if the table has changed since it was looked for.
    pub(super) fn enter(&mut self, model: &Model<'_, '_>) -> Option<u64> {
        if let Some(id) = model.id {
            return self.hashes.contains_key(&id).then_some(id);
        }
        let same_hash = self.by_hash.entry(model.hash).or_default();
        if same_hash.iter().any(|(number, _)| !model.seen.contains(number)) {
            return None;
        }
        self.n_entered += 1;
        same_hash.push((self.n_entered, model.object.clone().unbind()));
        self.hashes.insert(self.n_entered, model.hash);
        Some(self.n_entered)
    }

    /// The model with the number `id`.
    pub(super) fn get(&self, py: Python<'_>, id: u64) -> Option<Py<PyAny>> {
        let same_hash = self.by_hash.get(self.hashes.get(&id)?)?;
        same_hash.iter().find(|(number, _)| *number == id).map(|(_, model)| model.clone_ref(py))
    }

    /// Takes a model out; the caller drops it when no lock is held.
    pub(super) fn remove(&mut self, id: u64) -> Option<Py<PyAny>> {
        let hash = self.hashes.remove(&id)?;
        let same_hash = self.by_hash.get_mut(&hash)?;
        let at = same_hash.iter().position(|(number, _)| *number == id)?;
        let (_, model) = same_hash.swap_remove(at);
        if same_hash.is_empty() {
            self.by_hash.remove(&hash);
        }
        Some(model)
    }

    pub(super) fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        self.by_hash.values().flatten().try_for_each(|(_, model)| visit.call(model))
    }
}
