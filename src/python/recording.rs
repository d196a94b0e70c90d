//! A prefill whose windows are stored while later ones are computed.

use super::bridge::{PyArray, integers};
use super::prefill::prefill_stored;
use super::store::{Ids, PyView, contents, leaves};
use crate::array::Array;
use crate::error::Result;
use crate::store::view::{Cuts, Located, Recorder};
use pyo3::prelude::*;
use std::collections::VecDeque;
use std::thread::JoinHandle;

/// What is stored of a prefill. One window at a time leaves for the host, on a thread that calls no MLX.
pub(super) struct Recording {
    recorder: Recorder,
    tokens: Vec<u32>,
    /// Tokens that are in the caches at the start.
    restored: usize,
    /// The records of windows that are under way, each with the tokens computed after it.
    under_way: VecDeque<(usize, Vec<Cuts>)>,
    leaving: Option<JoinHandle<()>>,
}

impl Recording {
    /// Tokens before the first window.
    pub(super) const fn restored(&self) -> usize {
        self.restored
    }

    /// Cuts the records of the window that ends after `done` tokens; gives what is to be computed with it.
    pub(super) fn cut(
        &mut self,
        py: Python<'_>,
        caches: &Bound<'_, PyAny>,
        done: usize,
        is_last: bool,
    ) -> PyResult<Vec<Array>> {
        let leaves = contents(&leaves(caches)?)?;
        let (recorder, tokens) = (&mut self.recorder, &self.tokens[..self.restored + done]);
        // Without the GIL: the index on the disk is asked what is there.
        let (cuts, arrays) = py.detach(move || recorder.cut(tokens, &leaves, is_last))?;
        self.under_way.push_back((done, cuts));
        Ok(arrays)
    }

    /// Stores what was cut of the first `done` tokens, which are computed.
    pub(super) fn store(&mut self, py: Python<'_>, done: usize) {
        let n_computed = self.under_way.partition_point(|(end, _)| *end <= done);
        let cuts: Vec<_> = self.under_way.drain(..n_computed).flat_map(|(_, cuts)| cuts).collect();
        if cuts.is_empty() {
            return;
        }
        // Without the GIL: the thread before may have to wait, and what it logs may be for Python.
        py.detach(move || match cuts.into_iter().map(Cuts::locate).collect::<Result<Vec<_>>>() {
            Ok(located) => self.send(located),
            Err(error) => tracing::warn!(%error, "a window is not stored"),
        });
    }

    fn send(&mut self, located: Vec<Located>) {
        self.wait();
        let store = move || {
            for located in located {
                if let Err(error) = located.store() {
                    tracing::warn!(%error, "a window is not stored");
                }
            }
        };
        match std::thread::Builder::new().name("mlxrs-record".to_owned()).spawn(store) {
            Ok(thread) => self.leaving = Some(thread),
            Err(error) => tracing::warn!(%error, "a window is not stored"),
        }
    }

    fn wait(&mut self) {
        if let Some(thread) = self.leaving.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that stores windows panicked");
        }
    }

    /// Waits until everything that was stored can be found.
    pub(super) fn finish(mut self, py: Python<'_>) {
        py.detach(move || self.wait());
    }
}

/// Computes what `caches` lack of `tokens`, which hold the first `restored`, and stores each window; gives the logits.
#[pyfunction]
#[pyo3(signature = (view, model, tokens, caches, *, restored, exact, step_size, progress = None))]
#[expect(clippy::too_many_arguments, reason = "keyword arguments of a Python function")]
pub(super) fn prefill_recorded<'py>(
    py: Python<'py>,
    view: &PyView,
    model: Bound<'py, PyAny>,
    tokens: Bound<'py, PyAny>,
    caches: Bound<'py, PyAny>,
    restored: usize,
    exact: bool,
    step_size: u32,
    progress: Option<Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    crate::ffi::check_not_forked("prefill")?;
    let Ids(ids) = tokens.extract()?;
    let left = integers("prefill", "token ids (P,)", &tokens)?.take_first_axis(restored, ids.len())?;
    let recording = Recording {
        recorder: Recorder::new(view.view(), restored, step_size, exact),
        tokens: ids,
        restored,
        under_way: VecDeque::new(),
        leaving: None,
    };
    PyArray(prefill_stored(py, model, left, caches, step_size as usize, progress, recording)?).into_pyobject(py)
}
