//! What `--net` asks for: the way out of the guest, and the card's address.
//!
//! ```text
//!   user[,fwd=tcp:HOST:GUEST]...   the host's network, through passt, without privileges
//!   tap=NAME                       the host's interface NAME
//!   unix=PATH                      whoever else is at the UNIX socket PATH
//!   ...[,mac=52:54:00:12:34:56]    the card's address; a random one otherwise
//! ```
//!
//! A forward takes connections to `HOST` on the host to port `GUEST` of the guest. `HOST`
//! is a port, then only the host itself can connect (127.0.0.1), or an address and a port:
//! `tcp:0.0.0.0:2222:22` lets everyone in, `tcp:[::1]:2222:22` is IPv6. Both `tcp` and
//! `udp` go.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::NonZeroU16;
use std::path::PathBuf;
use std::str::FromStr;

use super::mac::{MacAddress, MacError};

/// The longest name of an interface, in bytes (Linux: `IFNAMSIZ` less its terminator).
const LONGEST_INTERFACE: usize = 15;
/// The longest path of a UNIX socket, in bytes (`unix(7)`).
const LONGEST_SOCKET: usize = 107;

/// One network card, as the user asks for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetConfig {
    /// Where its frames go.
    pub backend: NetBackend,
    /// Its address; none: a random, locally administered one.
    pub mac: Option<MacAddress>,
}

/// Where a card's frames go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetBackend {
    /// To the host's own network, through `passt`.
    User {
        /// Ports of the host that lead into the guest.
        forwards: Vec<Forward>,
    },
    /// To an interface of the host.
    Tap {
        /// Its name.
        name: String,
    },
    /// To whoever is at the other end of a UNIX socket.
    Unix {
        /// Where the socket is.
        path: PathBuf,
    },
}

/// A port of the host that leads into the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forward {
    /// Which protocol's.
    pub protocol: ForwardProtocol,
    /// Where the host listens.
    pub host: SocketAddr,
    /// The port in the guest.
    pub guest: NonZeroU16,
}

/// What can be forwarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ForwardProtocol {
    /// Connections.
    Tcp,
    /// Datagrams.
    Udp,
}

/// What is wrong with a `--net`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NetConfigError {
    /// It does not begin with a backend.
    #[error("--net {0:?}: begin with user, tap=NAME or unix=PATH")]
    Backend(String),
    /// Nothing stands behind `tap=` or `unix=`.
    #[error("--net: {0} needs a name behind it: {0}=NAME")]
    Empty(&'static str),
    /// No interface has such a name.
    #[error("--net tap={0}: no interface has such a name: at most 15 characters, no /, % or blank")]
    Interface(String),
    /// No socket has such a path.
    #[error("--net unix={0}: the path of a socket has at most 107 bytes: give a shorter one")]
    Socket(String),
    /// An option that this backend does not have.
    #[error("--net {backend}: there is no {option:?} here: {backend} takes {takes}")]
    Option {
        /// Which backend.
        backend: &'static str,
        /// What was given.
        option: String,
        /// What could be.
        takes: &'static str,
    },
    /// A forward that is none.
    #[error(
        "--net user: fwd={0} is no forward: give tcp:HOSTPORT:GUESTPORT, or tcp:ADDRESS:HOSTPORT:GUESTPORT, or the same with udp"
    )]
    Forward(String),
    /// Two forwards from one port.
    #[error("--net user: two forwards from {0:?} port {1}: give one of them another host port")]
    ForwardTwice(ForwardProtocol, u16),
    /// The address is none.
    #[error("--net mac: {0}")]
    Mac(#[from] MacError),
    /// Two addresses.
    #[error("--net: a card has one address: give mac= once")]
    MacTwice,
}

impl NetBackend {
    const fn name(&self) -> &'static str {
        match self {
            Self::User { .. } => "user",
            Self::Tap { .. } => "tap",
            Self::Unix { .. } => "unix",
        }
    }

    fn parse(text: &str) -> Result<Self, NetConfigError> {
        match text.split_once('=') {
            None if text == "user" => Ok(Self::User { forwards: Vec::new() }),
            Some(("tap", "")) => Err(NetConfigError::Empty("tap")),
            Some(("unix", "")) => Err(NetConfigError::Empty("unix")),
            Some(("tap", name)) => {
                let good = |c: char| !c.is_whitespace() && !c.is_control() && c != '/' && c != '%';
                if name.len() > LONGEST_INTERFACE || !name.chars().all(good) {
                    return Err(NetConfigError::Interface(name.to_owned()));
                }
                Ok(Self::Tap { name: name.to_owned() })
            }
            Some(("unix", path)) if path.len() > LONGEST_SOCKET => {
                Err(NetConfigError::Socket(path.to_owned()))
            }
            Some(("unix", path)) => Ok(Self::Unix { path: path.into() }),
            _ => Err(NetConfigError::Backend(text.to_owned())),
        }
    }
}

impl FromStr for NetConfig {
    type Err = NetConfigError;

    fn from_str(text: &str) -> Result<Self, NetConfigError> {
        let mut parts = text.split(',');
        let mut backend = NetBackend::parse(parts.next().unwrap_or_default())?;
        let mut mac = None;
        for option in parts {
            match (option.split_once('='), &mut backend) {
                (Some(("mac", address)), _) => {
                    if mac.replace(address.parse()?).is_some() {
                        return Err(NetConfigError::MacTwice);
                    }
                }
                (Some(("fwd", forward)), NetBackend::User { forwards }) => {
                    let forward: Forward = forward.parse()?;
                    // passt's own rule: it keeps one table of ports for all addresses.
                    let (protocol, port) = (forward.protocol, forward.host.port());
                    if forwards.iter().any(|f| (f.protocol, f.host.port()) == (protocol, port)) {
                        return Err(NetConfigError::ForwardTwice(protocol, port));
                    }
                    forwards.push(forward);
                }
                (_, other) => {
                    let user = matches!(other, NetBackend::User { .. });
                    let takes = if user { "fwd= and mac=" } else { "mac=" };
                    let (backend, option) = (other.name(), option.to_owned());
                    return Err(NetConfigError::Option { backend, option, takes });
                }
            }
        }
        Ok(Self { backend, mac })
    }
}

impl fmt::Display for NetConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.backend {
            NetBackend::User { forwards } => {
                f.write_str("user")?;
                forwards.iter().try_for_each(|forward| write!(f, ",fwd={forward}"))?;
            }
            NetBackend::Tap { name } => write!(f, "tap={name}")?,
            NetBackend::Unix { path } => write!(f, "unix={}", path.display())?,
        }
        self.mac.iter().try_for_each(|mac| write!(f, ",mac={mac}"))
    }
}

impl fmt::Display for ForwardProtocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

impl fmt::Display for Forward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.protocol, self.host, self.guest)
    }
}

impl FromStr for Forward {
    type Err = NetConfigError;

    fn from_str(text: &str) -> Result<Self, NetConfigError> {
        Self::parse(text).ok_or_else(|| NetConfigError::Forward(text.to_owned()))
    }
}

impl Forward {
    fn parse(text: &str) -> Option<Self> {
        let (protocol, rest) = text.split_once(':')?;
        let protocol = match protocol {
            "tcp" => ForwardProtocol::Tcp,
            "udp" => ForwardProtocol::Udp,
            _ => return None,
        };
        let (host, guest) = rest.rsplit_once(':')?;
        let (address, port) = match host.rsplit_once(':') {
            None => (IpAddr::V4(Ipv4Addr::LOCALHOST), host),
            Some((address, port)) => {
                let v6 = address.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
                let address = match v6 {
                    Some(v6) => IpAddr::V6(v6.parse().ok()?),
                    None => IpAddr::V4(address.parse().ok()?),
                };
                (address, port)
            }
        };
        let port: NonZeroU16 = port.parse().ok()?;
        let host = SocketAddr::new(address, port.get());
        Some(Self { protocol, host, guest: guest.parse().ok()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn error(text: &str) -> String {
        let error = text.parse::<NetConfig>().unwrap_err().to_string();
        assert!(!error.contains('\n') && error.contains(':'), "{error}");
        error
    }

    #[test]
    fn forwards_stay_on_this_host_unless_told_otherwise() {
        let host = |text: &str| text.parse::<Forward>().unwrap().host.to_string();
        assert_eq!(host("tcp:2222:22"), "127.0.0.1:2222");
        assert_eq!(host("udp:0.0.0.0:5353:53"), "0.0.0.0:5353");
        assert_eq!(host("tcp:[::1]:80:8080"), "[::1]:80");
    }

    #[test]
    fn what_makes_no_sense_names_the_remedy() {
        assert!(error("").contains("begin with user, tap=NAME or unix=PATH"));
        assert!(error("users").contains("begin with"));
        assert!(error("user=me").contains("begin with"));
        assert!(error("tap=").contains("tap=NAME"));
        assert!(error("tap=tap0123456789abc").contains("at most 15"));
        assert!(error("tap=tap%d").contains("no /, %"));
        assert!(error("tap=../x").contains("no /, %"));
        assert!(error(&format!("unix=/{}", "x".repeat(107))).contains("shorter"));
        assert!(error("tap=tap0,fwd=tcp:1:2").contains("tap takes mac="));
        assert!(error("user,forward=tcp:1:2").contains("user takes fwd= and mac="));
        for forward in [
            "",
            "tcp",
            "tcp:22",
            "tcp:0:22",
            "tcp:22:0",
            "sctp:1:2",
            "tcp:::1:1:2",
            "tcp:x:1:2",
            "tcp:[127.0.0.1]:1:2",
        ] {
            assert!(error(&format!("user,fwd={forward}")).contains("tcp:HOSTPORT:GUESTPORT"));
        }
        assert!(error("user,fwd=tcp:1:2,fwd=tcp:0.0.0.0:1:3").contains("another host port"));
        assert!(error("user,mac=1").contains("52:54:00"));
        assert!(error("user,mac=02:00:00:00:00:01,mac=02:00:00:00:00:01").contains("once"));
    }

    proptest! {
        #[test]
        fn what_is_printed_is_read_again(
            kind in 0..3,
            forwards in proptest::collection::btree_map(1..u16::MAX, (any::<bool>(), any::<IpAddr>(), 1..u16::MAX), 0..5),
            mac in proptest::option::of(any::<[u8; 5]>()),
        ) {
            let backend = match kind {
                0 => NetBackend::User {
                    forwards: forwards
                        .into_iter()
                        .map(|(port, (tcp, ip, guest))| Forward {
                            protocol: if tcp { ForwardProtocol::Tcp } else { ForwardProtocol::Udp },
                            host: SocketAddr::new(ip, port),
                            guest: NonZeroU16::new(guest).unwrap(),
                        })
                        .collect(),
                },
                1 => NetBackend::Tap { name: "tap0".into() },
                _ => NetBackend::Unix { path: "/run/lan".into() },
            };
            let mac = mac.map(|[b, c, d, e, f]| MacAddress([2, b, c, d, e, f]));
            let config = NetConfig { backend, mac };
            prop_assert_eq!(config.to_string().parse(), Ok(config));
        }

        #[test]
        fn nothing_a_user_types_panics(text in "(user|tap=|unix=)?(,?(fwd|mac)=[a-z0-9:.\\[\\]]*)*") {
            let _ = text.parse::<NetConfig>();
        }
    }
}
