//! What a protected guest and its copy tell each other while both run: one ordered stream of messages
//! in each direction.
//!
//! ```text
//!   primary                                       secondary
//!   Input, ConsoleInput              ---------->  to its devices, in this order
//!   Settled                          ---------->  outputs that it need not keep any more
//!   Cut                              ---------->  a checkpoint begins: it stands, and waits for it
//!   Committed                        ---------->  outputs that were covered are out
//!   Beat, Term                       ---------->
//!                                    <----------  Answer
//!                                    <----------  Output, ConsoleOutput
//!                                    <----------  Write: to a shared disk, by digests; it is kept
//!   WritesDone                       ---------->  writes that it need not keep any more
//!                                    <----------  Loaded: it runs on from the checkpoint
//!                                    <----------  Taken: so much of the connection of checkpoints was read
//!   Heard                           <---------->  so much of this connection was read
//!   End                              ---------->  the guest ended, or is not protected any more
//! ```
//!
//! Checkpoints go over a connection of their own, so that nothing waits behind them in a socket; a [`window`] sees to it
//! that nothing does elsewhere on the link. Beats, and what decides, never wait for room; inputs and outputs of either side
//! have a window too, so that what is sent for a guest, or by it, faster than the link takes it does not delay beats.

pub mod message;
pub mod outbox;
pub mod window;

pub use message::{Kind, Message, MessageError, Reader, put};
pub use outbox::Outbox;
