//! Who owns which KV block. The storage itself is the runner's.

pub mod block_pool;
