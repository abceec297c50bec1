//! The replication stream: frames in, feedback out.
//!
//! `run` owns a [`Stream`] in one thread. That thread must never block on a queue: where there is no room downstream, it
//! calls [`Stream::hold`] instead of [`Stream::next`]. The server then feels the back-pressure (nothing is read,
//! INVARIANT I7), and the status updates that `hold` goes on sending keep it from ending the connection.

mod history;
mod making;
mod message;
mod retained;
pub mod settings;
pub mod slot;
mod stream;

pub use history::{History, history};
pub use making::make_slot;
pub use message::{Message, MessageError, parse};
pub use retained::{Retained, WAL_END, Warning, flushed, retained};
pub use slot::{SlotInfo, SystemInfo, create_slot, drop_slot, identify_system, slot_info, slots_there};
pub use stream::{Event, Feedback, Stream};

pub use crate::pq::Waker;
