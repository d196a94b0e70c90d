//! `prefill`: the core's loop over a Python model and Python caches, ours or others.

use super::base::{count, own};
use super::bridge::{PyArray, integers};
use super::foreign::{Snapshot, is_reference};
use super::recording::Recording;
use crate::array::{self, Array, Pending, memory};
use crate::prefill::{Pace, Step, Steps, run, start};
use pyo3::exceptions::{PyNotImplementedError, PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyString};
use std::ops::Range;

/// Runs `tokens` through `model` in windows of `step_size` and gives the logits (1, V) of the last token, evaluated.
///
/// The windows, the memory barrier after each and the points where caches are quantized are those of mlx-lm 0.32.2's
/// `generate_step(max_tokens=0)`; the barrier of one window is waited for while the next is being computed. If anything
/// is raised, Ctrl-C included, every cache is put back to the end of a whole window first.
#[pyfunction]
#[pyo3(signature = (model, tokens, cache, *, step_size, input_embeddings = None, kv_bits = None, kv_group_size = 64, quantized_kv_start = 5000, progress = None))]
#[expect(clippy::too_many_arguments, reason = "keyword arguments of a Python function")]
pub(super) fn prefill<'py>(
    py: Python<'py>,
    model: Bound<'py, PyAny>,
    tokens: Bound<'py, PyAny>,
    cache: Bound<'py, PyAny>,
    step_size: WindowSize,
    input_embeddings: Option<Bound<'py, PyAny>>,
    kv_bits: Option<i64>,
    kv_group_size: i64,
    quantized_kv_start: i64,
    progress: Option<Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    let op = "prefill";
    crate::ffi::check_not_forked(op)?;
    let embeddings =
        input_embeddings.map(|embeddings| embeddings.extract::<PyArray>()).transpose()?.map(|array| array.0);
    let tokens = integers(op, "token ids (P,)", &tokens)?;
    let total = total_tokens(&tokens, embeddings.as_ref())?;
    if embeddings.is_some() && !accepts(&model, "input_embeddings")? {
        return Err(PyValueError::new_err(
            "prefill: expected a model that takes input_embeddings, got one that does not",
        ));
    }
    let quantization = kv_bits.map(|bits| Quantization { bits, group_size: kv_group_size, start: quantized_kv_start });
    if let Some(quantization) = &quantization {
        quantization.check(&cache, count(op, "total", total as i64)?)?;
    }
    let pace = Pace::new(step_size.0)?;
    let steps = PySteps { embeddings, quantization, ..PySteps::new(py, model, tokens, cache, progress, pace) };
    PyArray(steps.run(total)?).into_pyobject(py)
}

/// Runs `tokens` (P,) on top of what `caches` and the recording's prompt already hold; gives the logits (1, V).
///
/// Windows end at multiples of `step_size`, and `progress` is told tokens, both counted from the prompt's first token.
pub(super) fn prefill_stored<'py>(
    py: Python<'py>,
    model: Bound<'py, PyAny>,
    tokens: Array,
    cache: Bound<'py, PyAny>,
    step_size: usize,
    progress: Option<Bound<'py, PyAny>>,
    recording: Recording,
) -> PyResult<Array> {
    let total = total_tokens(&tokens, None)?;
    let pace = Pace::new(Step::Tokens(step_size))?;
    let steps = PySteps { recording: Some(recording), ..PySteps::new(py, model, tokens, cache, progress, pace) };
    steps.run(total)
}

/// A `step_size`: a number of at least 1, or "auto".
pub(super) struct WindowSize(Step);

impl<'a, 'py> FromPyObject<'a, 'py> for WindowSize {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        if let Ok(name) = object.cast::<PyString>() {
            return match name.to_str()? {
                "auto" => Ok(Self(Step::Auto)),
                other => {
                    Err(PyValueError::new_err(format!("prefill: expected step_size \"auto\" or tokens, got {other:?}")))
                }
            };
        }
        let n_tokens = object.extract::<i64>()?;
        if n_tokens < 1 {
            return Err(PyValueError::new_err(format!("prefill: expected step_size of at least 1, got {n_tokens}")));
        }
        Ok(Self(Step::Tokens(count("prefill", "step_size", n_tokens)?)))
    }
}

/// Length of the prompt, of which tokens and embeddings must agree unless there are embeddings alone.
fn total_tokens(tokens: &Array, embeddings: Option<&Array>) -> PyResult<usize> {
    let n_tokens = tokens.dim(0);
    let total = match embeddings {
        None => n_tokens,
        Some(embeddings) if n_tokens == 0 || n_tokens == embeddings.dim_or(0) => embeddings.dim_or(0),
        Some(embeddings) => {
            let got = format!("{n_tokens} tokens and embeddings {:?}", embeddings.shape());
            return Err(PyValueError::new_err(format!(
                "prefill: expected tokens and embeddings of one length, got {got}"
            )));
        }
    };
    if total == 0 {
        return Err(PyValueError::new_err("prefill: expected at least one token, got an empty prompt"));
    }
    Ok(total)
}

/// True if the callable `model` takes the keyword `name`, or cannot be asked.
fn accepts(model: &Bound<'_, PyAny>, name: &str) -> PyResult<bool> {
    let py = model.py();
    let inspect = py.import("inspect")?;
    let Ok(signature) = inspect.call_method1("signature", (model,)) else { return Ok(true) };
    let parameters = signature.getattr("parameters")?;
    let any = inspect.getattr("Parameter")?.getattr("VAR_KEYWORD")?;
    for parameter in parameters.call_method0("values")?.try_iter()? {
        let parameter = parameter?;
        if parameter.getattr("name")?.eq(name)? || parameter.getattr("kind")?.eq(&any)? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// When and how caches are quantized on the way.
struct Quantization {
    bits: i64,
    group_size: i64,
    start: i64,
}

impl Quantization {
    /// Finds out before any work what would fail in its middle.
    fn check(&self, cache: &Bound<'_, PyAny>, total: usize) -> PyResult<()> {
        if !cache.is_instance_of::<PyList>() {
            let got = cache.get_type().qualname()?;
            return Err(PyTypeError::new_err(format!("prefill: with kv_bits, expected a list of caches, got {got}")));
        }
        crate::cache::Scheme::new(
            "prefill",
            count("prefill", "kv_group_size", self.group_size)?,
            count("prefill", "kv_bits", self.bits)?,
        )?;
        for cache in cache.try_iter()? {
            let cache = cache?;
            let class = cache.get_type();
            // mlx-lm's ring has the method, which raises.
            let is_ring = is_reference(&class, &["RotatingKVCache", "BatchRotatingKVCache"])?;
            let offset = cache.getattr("offset").and_then(|offset| offset.extract::<i64>()).unwrap_or(0);
            if is_ring && offset + total as i64 >= self.start {
                let name = class.qualname()?;
                return Err(PyNotImplementedError::new_err(format!("prefill: kv_bits is not supported for {name}")));
            }
        }
        Ok(())
    }

    /// Replaces the caches that are long enough, in the caller's list.
    fn apply(&self, cache: &Bound<'_, PyAny>) -> PyResult<()> {
        let list = cache.cast::<PyList>()?;
        for (index, cache) in list.iter().enumerate() {
            if cache.hasattr("to_quantized")? && cache.getattr("offset")?.ge(self.start)? {
                let arguments = PyDict::new(list.py());
                arguments.set_item("group_size", self.group_size)?;
                arguments.set_item("bits", self.bits)?;
                list.set_item(index, cache.call_method("to_quantized", (), Some(&arguments))?)?;
            }
        }
        Ok(())
    }
}

struct PySteps<'py> {
    py: Python<'py>,
    model: Bound<'py, PyAny>,
    tokens: Array,
    embeddings: Option<Array>,
    cache: Bound<'py, PyAny>,
    quantization: Option<Quantization>,
    progress: Option<Bound<'py, PyAny>>,
    pace: Pace,
    /// What is stored on the way.
    recording: Option<Recording>,
    /// Tokens up to the end of the last window that was begun.
    done: usize,
    total: usize,
    logits: Option<Array>,
}

impl<'py> PySteps<'py> {
    fn new(
        py: Python<'py>,
        model: Bound<'py, PyAny>,
        tokens: Array,
        cache: Bound<'py, PyAny>,
        progress: Option<Bound<'py, PyAny>>,
        pace: Pace,
    ) -> Self {
        let progress = progress.filter(|progress| !progress.is_none());
        let (embeddings, quantization, recording, logits) = (None, None, None, None);
        Self {
            py,
            model,
            tokens,
            embeddings,
            cache,
            quantization,
            progress,
            pace,
            recording,
            done: 0,
            total: 0,
            logits,
        }
    }

    fn run(mut self, total: usize) -> PyResult<Array> {
        self.total = total;
        if !self.pace.is_measuring() {
            self.expect_tokens(total)?;
        }
        let result = run(&mut self, total);
        let result = result.and(self.expect_tokens(0));
        // After an interrupt too: the next call goes on from what is stored.
        if let Some(recording) = self.recording {
            recording.finish(self.py);
        }
        result?;
        self.logits.ok_or_else(|| PyTypeError::new_err("prefill: the model gave no logits"))
    }

    /// Tells caches of ours how many tokens are still to come.
    fn expect_tokens(&self, n_tokens: usize) -> PyResult<()> {
        for cache in self.cache.try_iter()? {
            if let Some(own) = own(&cache?)
                && let Ok(cache) = own.lock()?.as_kv_mut()
            {
                cache.expect_tokens(n_tokens);
            }
        }
        Ok(())
    }

    /// Every array of the caches, and of the window's records.
    fn held(&mut self, is_last: bool) -> PyResult<Vec<Array>> {
        let mut arrays = Vec::new();
        for cache in self.cache.try_iter()? {
            super::foreign::collect_arrays(&cache?, &mut arrays)?;
        }
        if let Some(recording) = &mut self.recording {
            arrays.extend(recording.cut(self.py, &self.cache, self.done, is_last)?);
        }
        Ok(arrays)
    }
}

impl<'py> Steps for PySteps<'py> {
    type Error = PyErr;
    /// The caches, and how to get each back.
    type Checkpoint = Vec<(Bound<'py, PyAny>, Snapshot<'py>)>;
    type Pending = Pending;

    fn step(&self) -> usize {
        let step = self.pace.step();
        self.recording.as_ref().map_or(step, |recording| step - (recording.restored() + self.done) % step)
    }

    fn checkpoint(&mut self, n_tokens: usize) -> PyResult<Self::Checkpoint> {
        // Here, before a window is begun, there is least to undo.
        self.py.check_signals()?;
        let snapshot = |cache: PyResult<Bound<'py, PyAny>>| {
            let cache = cache?;
            let snapshot = Snapshot::take(&cache, n_tokens)?;
            Ok((cache, snapshot))
        };
        self.cache.try_iter()?.map(snapshot).collect()
    }

    fn rollback(&mut self, checkpoint: Self::Checkpoint) {
        for (index, (cache, snapshot)) in checkpoint.into_iter().enumerate() {
            // A cache that was replaced by a quantized one comes back itself.
            let list = self.cache.cast::<PyList>().map(|list| list.set_item(index, &cache));
            if let Err(error) = snapshot.put_back(&cache).and(list.unwrap_or(Ok(()))) {
                tracing::error!(%error, "a cache could not be put back");
            }
        }
    }

    fn forward(&mut self, window: Range<usize>) -> PyResult<()> {
        let py = self.py;
        self.done = window.end;
        let tokens = if self.tokens.dim(0) == 0 {
            self.tokens.reshape(&[1, 0])?
        } else {
            self.tokens.take_first_axis(window.start, window.end)?.reshape(&[1, -1])?
        };
        let arguments = PyDict::new(py);
        arguments.set_item("cache", &self.cache)?;
        if let Some(embeddings) = &self.embeddings {
            let shape = embeddings.shape();
            let batch: Vec<i32> = [1, window.len() as i32].into_iter().chain(shape[1..].iter().copied()).collect();
            let embeddings = embeddings.take_first_axis(window.start, window.end)?.reshape(&batch)?;
            arguments.set_item("input_embeddings", PyArray(embeddings))?;
        }
        let logits = self.model.call((PyArray(tokens),), Some(&arguments))?.extract::<PyArray>()?.0;
        self.logits = Some(logits);
        self.quantization.as_ref().map_or(Ok(()), |quantization| quantization.apply(&self.cache))
    }

    fn barrier(&mut self) -> PyResult<Pending> {
        self.logits = None;
        let arrays = self.held(false)?;
        // Without the GIL, on this thread, which owns the streams.
        let pending = self.py.detach(move || start(&arrays))?;
        self.pace.started()?;
        Ok(pending)
    }

    fn wait(&mut self, pending: Pending) -> PyResult<()> {
        Ok(self.py.detach(move || pending.wait("prefill"))?)
    }

    fn computed(&mut self) -> PyResult<()> {
        let was_measuring = self.pace.is_measuring();
        self.pace.computed()?;
        if was_measuring {
            self.expect_tokens(self.total - self.done)?;
        }
        Ok(memory::bound_memory_cache()?)
    }

    fn finish(&mut self) -> PyResult<()> {
        let Some(logits) = self.logits.take() else { return Ok(()) };
        let (1, length, vocabulary) = (match *logits.shape() {
            [batch, length, vocabulary] if length > 0 => (batch, length, vocabulary),
            _ => (0, 0, 0),
        }) else {
            let got = format!("{logits:?}");
            return Err(PyValueError::new_err(format!("prefill: expected logits (1, S, V) from the model, got {got}")));
        };
        let last = logits.slice_axis_1(length as usize - 1)?.reshape(&[1, vocabulary])?;
        self.logits = Some(last.clone());
        let mut arrays = if self.recording.is_some() { self.held(true)? } else { Vec::new() };
        arrays.push(last);
        Ok(self.py.detach(move || array::eval("prefill", &arrays))?)
    }

    fn hides_failures(error: &PyErr) -> bool {
        // What MLX raises, in Python or here.
        Python::attach(|py| error.is_instance_of::<PyRuntimeError>(py))
    }

    fn progress(&mut self, done: usize, total: usize) -> PyResult<()> {
        let mut before = 0;
        if let Some(recording) = &mut self.recording {
            recording.store(self.py, done);
            before = recording.restored();
        }
        self.py.check_signals()?;
        let (done, total) = (before + done, before + total);
        self.progress.as_ref().map_or(Ok(()), |progress| progress.call1((done, total)).map(|_| ()))
    }
}
