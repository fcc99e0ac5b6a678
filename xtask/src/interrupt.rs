//! Ctrl-C and SIGTERM: child processes end with this one, and temporary folders are removed.

use std::process::{self, Child, Command};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};

/// Exit status of a second interrupt, as of a shell after Ctrl-C.
const STATUS: i32 = 130;

/// Time between two looks at a child that is watched.
const TICK: Duration = Duration::from_millis(10);

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Locked while a child is started, so that an interrupt finds every child.
static CHILDREN: Mutex<Vec<Weak<Mutex<Child>>>> = Mutex::new(Vec::new());

/// From here on an interrupt kills all [`Guarded`] children and makes [`check`] fail. A second one
/// exits at once.
pub fn listen() -> Result<()> {
    ctrlc::set_handler(|| {
        if INTERRUPTED.swap(true, Ordering::SeqCst) {
            process::exit(STATUS);
        }
        for child in lock(&CHILDREN).iter().filter_map(Weak::upgrade) {
            kill(&mut lock(&child));
        }
    })
    .context("cannot listen for interrupts")
}

/// Fails after an interrupt.
pub fn check() -> Result<()> {
    if INTERRUPTED.load(Ordering::SeqCst) {
        bail!("interrupted");
    }
    Ok(())
}

/// A child process, in a group of its own with its children. Killed by an interrupt and when dropped.
pub struct Guarded(Arc<Mutex<Child>>);

impl Guarded {
    pub fn spawn(mut command: Command) -> Result<Self> {
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let mut children = lock(&CHILDREN);
        check()?;
        let child = command
            .spawn()
            .with_context(|| format!("cannot start {:?}", command.get_program()))?;
        let child = Arc::new(Mutex::new(child));
        children.retain(|child| child.strong_count() > 0);
        children.push(Arc::downgrade(&child));
        Ok(Self(child))
    }

    /// Kills it as soon as `is_due`, asked with its id again and again, says so. The returned flag is
    /// set then.
    pub fn kill_when(&self, is_due: impl Fn(u32) -> bool + Send + 'static) -> Arc<AtomicBool> {
        let (child, id) = (Arc::downgrade(&self.0), self.child().id());
        let killed = Arc::new(AtomicBool::new(false));
        let flag = killed.clone();
        thread::spawn(move || {
            while let Some(child) = child.upgrade() {
                if is_due(id) {
                    flag.store(true, Ordering::SeqCst);
                    kill(&mut lock(&child));
                    break;
                }
                drop(child);
                thread::sleep(TICK);
            }
        });
        killed
    }

    /// Not to be waited for while locked: an interrupt could not kill it.
    pub fn child(&self) -> MutexGuard<'_, Child> {
        lock(&self.0)
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        kill(&mut self.child());
    }
}

/// Kills a child and its group, unless it has ended.
fn kill(child: &mut Child) {
    if !matches!(child.try_wait(), Ok(None)) {
        return;
    }
    #[cfg(unix)]
    let _ = rustix::process::kill_process_group(
        rustix::process::Pid::from_child(child),
        rustix::process::Signal::KILL,
    );
    let _ = child.kill();
    let _ = child.wait();
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
