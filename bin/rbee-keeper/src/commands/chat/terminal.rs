//! The terminal's echo: off while an answer comes, so that what is typed meanwhile does not stand in the middle
//! of it. It is kept by the terminal and is on the next line to be edited, unless Ctrl-C took it back.

use std::io;

use rustix::termios::{LocalModes, OptionalActions, QueueSelector, Termios, tcflush, tcgetattr, tcsetattr};

/// The terminal on stdin; it is left as it was found.
#[derive(Debug)]
pub(super) struct Terminal {
    found: Termios,
}

/// Typing is not shown for as long as this lives.
#[derive(Debug)]
pub(super) struct Hushed<'a>(&'a Terminal);

impl Terminal {
    /// Remembers how it is now.
    ///
    /// # Errors
    /// When stdin is no terminal.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self { found: tcgetattr(io::stdin())? })
    }

    /// Shows no typing.
    pub(super) fn hush(&self) -> Hushed<'_> {
        let mut quiet = self.found.clone();
        quiet.local_modes.remove(LocalModes::ECHO | LocalModes::ECHONL);
        // Ctrl-C would also throw away text that is on its way to the screen.
        quiet.local_modes.insert(LocalModes::NOFLSH);
        // A terminal that cannot do it echoes, which is ugly and no reason to stop.
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &quiet);
        Hushed(self)
    }
}

impl Hushed<'_> {
    /// Takes back what was typed meanwhile.
    pub(super) fn forget_typing(&self) {
        let _ = tcflush(io::stdin(), QueueSelector::IFlush);
    }
}

impl Drop for Hushed<'_> {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.0.found);
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.found);
    }
}
