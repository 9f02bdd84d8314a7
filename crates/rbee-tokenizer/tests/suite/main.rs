//! The crate as a worker uses it.

#[cfg(test)]
mod chat;
#[cfg(test)]
mod families;
mod fixtures;
#[cfg(test)]
mod hostile;
#[cfg(test)]
mod streams;
#[cfg(test)]
mod templates;
