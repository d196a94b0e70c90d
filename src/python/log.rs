//! What the core has to tell goes to Python's `logging`, as `mlxrs_py` and the modules below it.
//!
//! Whoever tells something may hold a lock, so nobody waits for the GIL, as with pyo3-log: a thread of its own takes what
//! there is to Python, and ends.

use pyo3::prelude::*;
use std::collections::VecDeque;
use std::fmt::{self, Write as _};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// The variable that asks for everything instead of warnings and errors: `debug`.
const VARIABLE: &str = "MLXRS_PY_LOG";
/// Lines that wait at most; later ones are dropped.
const MOST: usize = 1000;

struct Line {
    level: Level,
    logger: String,
    text: String,
}

#[derive(Default)]
struct Queue {
    lines: VecDeque<Line>,
    /// The thread that takes them, once there was one; it ends when there are none.
    thread: Option<JoinHandle<()>>,
    is_served: bool,
    /// Python is going.
    is_closed: bool,
}

static QUEUE: Mutex<Queue> =
    Mutex::new(Queue { lines: VecDeque::new(), thread: None, is_served: false, is_closed: false });

fn queue() -> MutexGuard<'static, Queue> {
    QUEUE.lock().unwrap_or_else(PoisonError::into_inner)
}

struct ToPython {
    most: Level,
    /// A forked child tells nothing: it has no such thread, and the lock may be held for ever.
    process: u32,
}

impl Subscriber for ToPython {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && *metadata.level() <= self.most
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        if std::process::id() != self.process {
            return;
        }
        let mut text = Text::default();
        event.record(&mut text);
        let Text { message, fields } = text;
        let logger = event.metadata().target().replace("::", ".");
        let line = Line { level: *event.metadata().level(), logger, text: message + &fields };
        let mut queue = queue();
        if queue.is_closed || queue.lines.len() >= MOST {
            return;
        }
        queue.lines.push_back(line);
        if !queue.is_served {
            // The one before, if any, has nothing left to do.
            queue.thread = std::thread::Builder::new().name("mlxrs-log".to_owned()).spawn(serve).ok();
            queue.is_served = queue.thread.is_some();
        }
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

/// An event in words: its message, then the fields.
#[derive(Default)]
struct Text {
    message: String,
    fields: String,
}

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a string cannot fail.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, ", {name}: {value:?}"),
        };
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }
}

fn serve() {
    loop {
        let line = {
            let mut queue = queue();
            let line = queue.lines.pop_front();
            queue.is_served = line.is_some();
            line
        };
        let Some(line) = line else { return };
        // None if Python is already going.
        let _: Option<()> = Python::try_attach(|py| tell(py, &line));
    }
}

fn tell(py: Python<'_>, line: &Line) {
    let level = match line.level {
        Level::ERROR => 40,
        Level::WARN => 30,
        Level::INFO => 20,
        _ => 10,
    };
    let logged = py
        .import("logging")
        .and_then(|logging| logging.call_method1("getLogger", (&line.logger,)))
        .and_then(|logger| logger.call_method1("log", (level, "%s", &line.text)));
    if let Err(error) = logged {
        error.write_unraisable(py, None);
    }
}

/// Tells what is left, and nothing from now on: a thread that waits for Python must not outlive it.
#[pyfunction]
fn close_log(py: Python<'_>) {
    let thread = {
        let mut queue = queue();
        queue.is_closed = true;
        queue.thread.take()
    };
    if let Some(thread) = thread {
        py.detach(|| drop(thread.join()));
    }
}

/// From now on Python hears of what goes wrong here.
pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let is_debug = std::env::var(VARIABLE).is_ok_and(|level| level.eq_ignore_ascii_case("debug"));
    let most = if is_debug { Level::DEBUG } else { Level::WARN };
    // Fails if the module is imported once more, into another interpreter: the first one hears then.
    if tracing::subscriber::set_global_default(ToPython { most, process: std::process::id() }).is_ok() {
        let close = wrap_pyfunction!(close_log, module)?;
        module.py().import("atexit")?.call_method1("register", (close,))?;
    }
    Ok(())
}
