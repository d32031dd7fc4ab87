//! The network card from its driver's side, with a peer on a socket.

mod control;
mod guest;
mod host;
mod hostile;
mod peers;
mod traffic;
