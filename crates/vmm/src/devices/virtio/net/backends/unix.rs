//! `unix=PATH`: two cards, or a card and a program, joined by a UNIX socket.
//!
//! The rule: who finds somebody listening at PATH joins them. Who finds nobody, neither a
//! file nor anyone behind it, listens there; a socket left behind by a process that is
//! gone is replaced, anything else at PATH is left alone and is an error. A lock on
//! the folder makes this one step, so that of two that start together one listens and
//! one joins. Who listens talks to one peer at a time, turns further ones away, waits for
//! the next when one leaves, and removes the socket in the end. Who had joined and is
//! left (after having talked) applies the rule again, and so listens for the next.

use std::fs::{self, File, Metadata, TryLockError};
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use event_manager::{EventOps, EventSet};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};

use super::super::error::NetError;
use super::super::header::Header;
use super::stream::{FEATURES, FrameStream};
use super::{Backend, Incoming, unwatch, watch};

const PEER: u32 = 0;
const LISTENER: u32 = 1;

/// How often the folder's lock is tried, a millisecond apart: whoever holds it is about
/// to make two system calls.
const LOCK_TRIES: u32 = 50;

/// How many peers are looked at before other work has its turn.
const MOST_AT_ONCE: u32 = 128;

/// A socket that we listen at, and remove.
#[derive(Debug)]
struct Listener {
    socket: UnixListener,
    path: PathBuf,
    /// Device and inode of the file.
    file: Option<(u64, u64)>,
}

fn identity(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

impl Drop for Listener {
    fn drop(&mut self) {
        let now = fs::symlink_metadata(&self.path).ok().as_ref().map(identity);
        if now.is_some()
            && now == self.file
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::debug!(path = %self.path.display(), %error, "net: the socket stays");
        }
    }
}

/// What was found at the path.
enum Found {
    Peer(UnixStream),
    Nobody(Listener),
}

/// Connects without waiting for room in the listener's queue.
fn connect(path: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket.into())
}

/// A lock on a folder, until it is dropped.
struct Locked<'f>(&'f File);

impl<'f> Locked<'f> {
    /// Waits a little for whoever has it. Without it two may listen; that is all.
    fn new(folder: &'f File) -> Self {
        for _ in 0..LOCK_TRIES {
            match folder.try_lock() {
                Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(1)),
                Err(TryLockError::Error(error)) => {
                    tracing::debug!(%error, "net: no lock on the socket's folder");
                    break;
                }
                Ok(()) => break,
            }
        }
        Self(folder)
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        // Fails only where locking has.
        let _ = self.0.unlock();
    }
}

fn failed(
    path: &Path,
    operation: &'static str,
    error: io::Error,
    remedy: &'static str,
) -> NetError {
    NetError::Unix { path: path.to_path_buf(), operation, error, remedy }
}

fn open_folder(path: &Path) -> Result<File, NetError> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    File::open(folder.unwrap_or(Path::new("."))).map_err(|error| {
        failed(path, "opening its folder", error, "give a folder that you can read")
    })
}

fn meet(path: &Path, folder: &File) -> Result<Found, NetError> {
    let failed = |operation, error, remedy| failed(path, operation, error, remedy);
    let _locked = Locked::new(folder);
    let no_socket = "give another path, or remove what is there";
    match connect(path) {
        Ok(peer) => return Ok(Found::Peer(peer)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            // Also what connecting to a file that is no socket says.
            let is_socket = fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket());
            if !is_socket {
                return Err(failed("connecting", error, no_socket));
            }
            fs::remove_file(path)
                .map_err(|error| failed("removing a socket left behind", error, no_socket))?;
        }
        Err(error) => return Err(failed("connecting", error, no_socket)),
    }
    let listen = || {
        let socket = UnixListener::bind(path)?;
        socket.set_nonblocking(true)?;
        Ok(socket)
    };
    let socket = listen().map_err(|error| {
        failed("listening", error, "give a path in a folder that you can write to")
    })?;
    let file = fs::symlink_metadata(path).ok().as_ref().map(identity);
    Ok(Found::Nobody(Listener { socket, path: path.to_path_buf(), file }))
}

/// The backend.
#[derive(Debug)]
pub(in super::super) struct UnixBackend {
    path: PathBuf,
    /// The socket's, open: nothing is opened once a guest runs.
    folder: File,
    listener: Option<Listener>,
    peer: Option<FrameStream>,
    /// The peer has come and is not registered yet.
    arrived: bool,
    /// Who came while the last peer was leaving.
    next: Option<UnixStream>,
    features: u64,
}

impl UnixBackend {
    /// Joins whoever listens at `path`, or listens there.
    ///
    /// # Errors
    /// [`NetError::Unix`].
    pub(in super::super) fn open(path: &Path) -> Result<Self, NetError> {
        let mut this = Self {
            path: path.to_path_buf(),
            folder: open_folder(path)?,
            listener: None,
            peer: None,
            arrived: false,
            next: None,
            features: 0,
        };
        this.join()?;
        Ok(this)
    }

    fn join(&mut self) -> Result<(), NetError> {
        match meet(&self.path, &self.folder)? {
            Found::Peer(peer) => {
                self.take(peer);
                tracing::info!(path = %self.path.display(), "net: joined");
            }
            Found::Nobody(listener) => {
                self.listener = Some(listener);
                tracing::info!(path = %self.path.display(), "net: waiting for a peer");
            }
        }
        Ok(())
    }

    fn take(&mut self, socket: UnixStream) {
        match FrameStream::new(socket) {
            Ok(mut peer) => {
                peer.start(self.features);
                self.peer = Some(peer);
                self.arrived = true;
            }
            Err(error) => tracing::warn!(%error, "net: a peer cannot be served"),
        }
    }

    fn accept(&mut self) {
        for _ in 0..MOST_AT_ONCE {
            let Some(listener) = &self.listener else { return };
            let Ok((socket, _)) = listener.socket.accept() else { return };
            if let Some(peer) = &mut self.peer {
                // It may have left, and we hear of the newcomer first.
                peer.check_other_end();
                if peer.is_lost() && self.next.is_none() {
                    self.next = Some(socket);
                    continue;
                }
                tracing::warn!(path = %self.path.display(), "net: a second peer is turned away");
                continue;
            }
            tracing::info!(path = %self.path.display(), "net: a peer has come");
            self.take(socket);
        }
    }
}

impl Backend for UnixBackend {
    fn features(&self) -> u64 {
        FEATURES
    }

    fn start(&mut self, features: u64, _active: bool) {
        self.features = features;
        if let Some(peer) = &mut self.peer {
            peer.start(features);
        }
    }

    fn register(&mut self, ops: &mut EventOps<'_>) {
        if let Some(listener) = &self.listener {
            watch(ops, &listener.socket, LISTENER);
        }
        if let Some(peer) = &mut self.peer {
            peer.assume_ready();
            watch(ops, peer.socket(), PEER);
        }
        self.arrived = false;
    }

    fn event(&mut self, token: u32, set: EventSet) {
        if token == LISTENER {
            self.accept();
        } else if let Some(peer) = &mut self.peer {
            peer.event(set);
        }
    }

    fn settle(&mut self, ops: &mut EventOps<'_>) {
        if let Some(peer) = self.peer.take_if(|peer| peer.is_lost()) {
            if !std::mem::take(&mut self.arrived) {
                unwatch(ops, peer.socket());
            }
            tracing::warn!(path = %self.path.display(), "net: the peer is gone, the link is down");
            let talked = peer.frames_in > 0;
            drop(peer);
            if let Some(next) = self.next.take() {
                tracing::info!(path = %self.path.display(), "net: a peer has come");
                self.take(next);
            } else if self.listener.is_none() && talked {
                match self.join() {
                    Ok(()) => self.register(ops),
                    Err(error) => tracing::warn!("{error}"),
                }
            }
        }
        if std::mem::take(&mut self.arrived)
            && let Some(peer) = &self.peer
        {
            watch(ops, peer.socket(), PEER);
        }
    }

    fn is_up(&self) -> bool {
        self.peer.as_ref().is_some_and(|peer| !peer.is_lost())
    }

    fn peek(&mut self) -> Option<Incoming<'_>> {
        self.peer.as_mut()?.peek()
    }

    fn consume(&mut self) {
        if let Some(peer) = &mut self.peer {
            peer.consume();
        }
    }

    fn can_send(&mut self) -> bool {
        self.peer.as_mut().is_none_or(FrameStream::can_send)
    }

    fn send(&mut self, header: &Header, frame: &mut dyn Read, len: usize) -> &[u8] {
        // With nobody there, a frame goes where it goes on an unplugged cable.
        self.peer.as_mut().map(|peer| peer.send(header, frame, len)).unwrap_or_default()
    }

    fn flush(&mut self) {
        if let Some(peer) = &mut self.peer {
            peer.flush();
        }
    }
}
