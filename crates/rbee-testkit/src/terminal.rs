//! A terminal as a person has it: a program on a real pseudo-terminal, and a model of the screen that it draws.

use std::fs::File;
use std::io::{Read, Write};
use std::num::NonZeroU16;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pty_process::Size;
use pty_process::blocking::{Command as OnPty, open};
use rustix::termios::{LocalModes, tcgetattr, tcsetwinsize};

use crate::command::LIMIT;
use crate::process::{Signal, send};
use crate::wait::wait_for;

/// What keys send.
pub mod key {
    /// Enter.
    pub const ENTER: &str = "\r";
    /// Backspace.
    pub const BACKSPACE: &str = "\x7f";
    /// Tab.
    pub const TAB: &str = "\t";
    /// Arrow up.
    pub const UP: &str = "\x1b[A";
    /// Arrow left.
    pub const LEFT: &str = "\x1b[D";
    /// Ctrl-C.
    pub const CTRL_C: &str = "\x03";
    /// Ctrl-D.
    pub const CTRL_D: &str = "\x04";
}

/// What a program has drawn.
struct Seen {
    parser: vt100::Parser<Titles>,
    raw: Vec<u8>,
}

#[derive(Default)]
struct Titles(Vec<String>);

impl vt100::Callbacks for Titles {
    fn set_window_title(&mut self, _: &mut vt100::Screen, title: &[u8]) {
        self.0.push(String::from_utf8_lossy(title).into_owned());
    }
}

/// A program on a terminal. It ends with its value.
pub struct Terminal {
    what: String,
    child: Child,
    keyboard: File,
    seen: Arc<Mutex<Seen>>,
}

fn side(count: u16) -> NonZeroU16 {
    NonZeroU16::new(count).expect("a terminal has rows and columns")
}

impl Terminal {
    /// Starts a program on a terminal of its own, whose session it leads.
    ///
    /// # Panics
    /// When that is not possible.
    #[track_caller]
    pub fn start(mut command: Command, columns: u16, rows: u16) -> Self {
        let what = format!("{:?}", command.get_args().collect::<Vec<_>>());
        // A test may have taken it away to say another kind.
        if !command.get_envs().any(|(name, _)| name == "TERM") {
            command.env("TERM", "xterm-256color");
        }
        let (pty, screen) = open().expect("the system has pseudo-terminals");
        pty.resize(Size::new(rows, columns)).expect("a new terminal can be sized");
        let child = OnPty::from(command).spawn(screen).unwrap_or_else(|error| panic!("cannot start {what}: {error}"));
        let keyboard = File::from(OwnedFd::from(pty));
        let mut output = keyboard.try_clone().expect("a handle can be doubled");
        let parser = vt100::Parser::new_with_callbacks(side(rows), side(columns), 1000, Titles::default());
        let seen = Arc::new(Mutex::new(Seen { parser, raw: Vec::new() }));
        let draw = seen.clone();
        std::thread::spawn(move || {
            let mut buffer = vec![0; 16 << 10];
            // The read fails once nobody holds the other side any more.
            while let Ok(count @ 1..) = output.read(&mut buffer) {
                let mut seen = draw.lock().unwrap_or_else(PoisonError::into_inner);
                seen.parser.process(&buffer[..count]);
                seen.raw.extend_from_slice(&buffer[..count]);
            }
        });
        Self { what, child, keyboard, seen }
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Types.
    ///
    /// # Panics
    /// When the terminal is gone.
    #[track_caller]
    pub fn types(&self, keys: &str) -> &Self {
        (&self.keyboard).write_all(keys.as_bytes()).unwrap_or_else(|error| panic!("{}: {error}", self.what));
        self
    }

    /// What stands on the screen; a line that wrapped is one line.
    pub fn screen(&self) -> String {
        self.seen().parser.screen().contents()
    }

    /// All bytes that were drawn, as text.
    pub fn raw(&self) -> String {
        String::from_utf8_lossy(&self.seen().raw).into_owned()
    }

    /// The titles that the terminal was given.
    pub fn titles(&self) -> Vec<String> {
        self.seen().parser.callbacks().0.clone()
    }

    /// The cursor's column, from 0.
    pub fn column(&self) -> u16 {
        self.seen().parser.screen().cursor_position().1
    }

    /// Waits until the screen is as wanted, and gives it.
    ///
    /// # Panics
    /// When it does not become so in time.
    #[track_caller]
    pub fn sees(&self, what: &str, fits: impl Fn(&str) -> bool) -> String {
        wait_for(&format!("{what} on the screen of {}", self.what), LIMIT, || {
            let screen = self.screen();
            if fits(&screen) { Ok(screen) } else { Err(format!("\n{screen}\n")) }
        })
    }

    /// Waits until a text stands on the screen.
    ///
    /// # Panics
    /// When it does not come in time.
    #[track_caller]
    pub fn sees_text(&self, text: &str) -> String {
        self.sees(&format!("{text:?}"), |screen| screen.contains(text))
    }

    /// Waits until the cursor's line is exactly this, trailing spaces aside.
    ///
    /// # Panics
    /// When it does not become so in time.
    #[track_caller]
    pub fn sees_line(&self, line: &str) {
        wait_for(&format!("the line {line:?} at the cursor of {}", self.what), LIMIT, || {
            let seen = self.seen();
            let screen = seen.parser.screen();
            let (_, columns) = screen.size();
            let row = usize::from(screen.cursor_position().0);
            let at_cursor = screen.rows(0, columns.get()).nth(row).unwrap_or_default();
            if at_cursor.trim_end() == line {
                Ok(())
            } else {
                Err(format!("{at_cursor:?} in\n{}\n", screen.contents()))
            }
        });
    }

    /// Makes the terminal another size, as a person who drags its corner.
    ///
    /// # Panics
    /// When the terminal is gone.
    #[track_caller]
    pub fn resize(&self, columns: u16, rows: u16) {
        self.seen().parser.set_size(side(rows), side(columns));
        let size = rustix::termios::Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&self.keyboard, size).unwrap_or_else(|error| panic!("{}: {error}", self.what));
    }

    /// Whether the terminal edits lines by itself and shows what is typed, as a shell finds it.
    pub fn is_cooked(&self) -> bool {
        let wanted = LocalModes::ECHO | LocalModes::ICANON | LocalModes::ISIG;
        tcgetattr(&self.keyboard).is_ok_and(|modes| modes.local_modes.contains(wanted))
    }

    /// Sends the program a signal.
    pub fn signal(&self, signal: Signal) {
        send(self.child.id(), signal);
    }

    /// Waits for the program's end and gives its exit code; 128 and the signal's number when one ended it.
    ///
    /// # Panics
    /// When it does not end in time.
    #[track_caller]
    pub fn ends(&mut self) -> i32 {
        wait_for(&format!("the end of {}", self.what), LIMIT.min(Duration::from_secs(20)), || {
            match self.child.try_wait() {
                Ok(Some(status)) => Ok(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))),
                _ => Err(format!(
                    "\n{}\n",
                    self.seen.lock().unwrap_or_else(PoisonError::into_inner).parser.screen().contents()
                )),
            }
        })
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
