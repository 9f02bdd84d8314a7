//! Where a request may go, and who sees the token.
//!
//! The hub redirects large files to wherever it keeps them. A redirect may lead to any public https address; to an
//! address that is not public, or without TLS, only when its origin is the endpoint's own or a listed one. A name is
//! judged by the addresses that it resolves to, at the moment it is connected to.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use reqwest::Url;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};

use crate::error::Error;
use crate::options::Options;

/// What is known of a target before a connection is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// The endpoint or a listed origin: its addresses are not looked at.
    Trusted,
    /// Any other https address: only public addresses are connected to.
    Public,
}

/// Judges a target.
///
/// # Errors
/// [`Error::RefusedTarget`].
pub(crate) fn judge(options: &Options, url: &Url) -> Result<Target, Error> {
    let refused = |problem: &str| Err(Error::RefusedTarget { url: origin(url), problem: problem.to_owned() });
    if is_endpoint(options, url) || options.trusted_origins.iter().any(|origin| origin.origin() == url.origin()) {
        return Ok(Target::Trusted);
    }
    if url.scheme() != "https" {
        return refused("it is neither https nor the hub's own origin");
    }
    let address = match url.host() {
        Some(url::Host::Ipv4(address)) => IpAddr::V4(address),
        Some(url::Host::Ipv6(address)) => IpAddr::V6(address),
        Some(url::Host::Domain(name)) => {
            let proxies = [&options.proxies.http, &options.proxies.https];
            if proxies.into_iter().flatten().any(|proxy| proxy.host_str() == Some(name)) {
                return refused("it is the proxy itself");
            }
            return Ok(Target::Public);
        }
        None => return refused("it has no host"),
    };
    if is_public(address) { Ok(Target::Public) } else { refused("it is not a public address") }
}

/// Whether a target is of the endpoint's own origin, which alone is shown the token.
pub(crate) fn is_endpoint(options: &Options, url: &Url) -> bool {
    options.endpoint.origin() == url.origin()
}

/// A target as it may be printed: its path and query may hold a signature.
pub(crate) fn origin(url: &Url) -> String {
    match url.origin() {
        url::Origin::Tuple(..) => url.origin().ascii_serialization(),
        url::Origin::Opaque(_) => format!("{}:", url.scheme()),
    }
}

/// Whether an address is one that anybody on the internet could have.
pub(crate) fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => is_public_v4(address),
        IpAddr::V6(address) => is_public_v6(address),
    }
}

fn is_public_v4(address: Ipv4Addr) -> bool {
    let [a, b, c, _] = address.octets();
    let special = address.is_private()
        || address.is_loopback()
        || address.is_link_local()
        || address.is_multicast()
        || address.is_documentation()
        || a == 0
        || a >= 240
        || (a, b) == (100, b & 0x3f | 0x40) // carriers' own, 100.64/10
        || (a, b, c) == (192, 0, 0)
        || (a, b, c) == (192, 88, 99)
        || (a, b & 0xfe) == (198, 18);
    !special
}

fn is_public_v6(address: Ipv6Addr) -> bool {
    let s = address.segments();
    let embedded = |high: u16, low: u16| {
        let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
        is_public_v4(Ipv4Addr::new(a, b, c, d))
    };
    if let Some(mapped) = address.to_ipv4_mapped() {
        return is_public_v4(mapped);
    }
    match s {
        // NAT64 and 6to4 carry an IPv4 address, which is where they lead.
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] => embedded(high, low),
        [0x2002, high, low, ..] => embedded(high, low),
        // Teredo, documentation, benchmarks.
        [0x2001, 0, ..] | [0x2001, 0xdb8, ..] | [0x2001, 2, ..] => false,
        // Of the rest only global unicast is public: no loopback, no link-local, no unique local, no multicast.
        [first, ..] => first & 0xe000 == 0x2000,
    }
}

/// Resolves names to public addresses only.
#[derive(Clone, Debug)]
pub(crate) struct PublicResolver {
    /// Hosts of the operator's own proxies, which may have any address.
    pub(crate) proxies: Vec<String>,
}

impl Resolve for PublicResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let any = self.proxies.iter().any(|proxy| proxy == name.as_str());
        Box::pin(async move {
            let found: Vec<SocketAddr> = tokio::net::lookup_host((name.as_str(), 0)).await?.collect();
            let kept: Vec<SocketAddr> =
                found.iter().copied().filter(|address| any || is_public(address.ip())).collect();
            if kept.is_empty() && !found.is_empty() {
                return Err(format!("`{}` has no public address", name.as_str()).into());
            }
            Ok(Box::new(kept.into_iter()) as Addrs)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn special_addresses_are_not_public() {
        for text in [
            "127.0.0.1",
            "127.9.9.9",
            "0.0.0.0",
            "0.1.2.3",
            "10.0.0.1",
            "172.16.0.1",
            "172.31.255.255",
            "192.168.1.1",
            "169.254.169.254",
            "100.64.0.1",
            "100.127.255.255",
            "192.0.0.1",
            "198.18.0.1",
            "198.19.255.255",
            "224.0.0.1",
            "240.0.0.1",
            "255.255.255.255",
            "192.0.2.1",
            "::",
            "::1",
            "::ffff:127.0.0.1",
            "::ffff:169.254.169.254",
            "::127.0.0.1",
            "fe80::1",
            "fec0::1",
            "fc00::1",
            "fd12::1",
            "ff02::1",
            "64:ff9b::7f00:1",
            "64:ff9b:1::1",
            "2002:7f00:1::",
            "2001::1",
            "2001:db8::1",
        ] {
            assert!(!is_public(text.parse().unwrap()), "{text}");
        }
        for text in [
            "1.1.1.1",
            "100.63.255.255",
            "100.128.0.1",
            "172.15.0.1",
            "172.32.0.1",
            "198.20.0.1",
            "192.0.1.1",
            "2606:4700::1111",
            "::ffff:1.1.1.1",
            "64:ff9b::101:101",
            "2a00:1450::1",
        ] {
            assert!(is_public(text.parse().unwrap()), "{text}");
        }
    }

    #[test]
    fn only_public_https_targets_and_listed_origins_are_fetched() {
        let mut options = Options::new("/h", "http://127.0.0.1:8000/mirror").unwrap();
        options.trusted_origins = vec![Url::parse("http://127.0.0.1:9000").unwrap()];
        options.proxies.https = Some(Url::parse("http://proxy.lan:3128").unwrap());
        let judged = |text: &str| judge(&options, &Url::parse(text).unwrap()).ok();
        assert_eq!(judged("http://127.0.0.1:8000/x"), Some(Target::Trusted));
        assert_eq!(judged("http://127.0.0.1:9000/x?sig=1"), Some(Target::Trusted));
        assert_eq!(judged("https://cdn.example/x"), Some(Target::Public));
        assert_eq!(judged("https://1.1.1.1/x"), Some(Target::Public));
        for text in [
            "http://cdn.example/x",
            "http://127.0.0.1:8001/x",
            "https://127.0.0.1:8000/x",
            "http://localhost:8000/x",
            "https://2130706433/x",
            "https://0x7f.1/x",
            "https://0177.0.0.1/x",
            "https://[::ffff:7f00:1]/x",
            "https://[::1]/x",
            "https://169.254.169.254/latest",
            "file:///etc/passwd",
            "ftp://cdn.example/x",
            "https://proxy.lan/x",
            "data:text/plain,x",
        ] {
            assert_eq!(judged(text), None, "{text}");
        }
        let error = judge(&options, &Url::parse("http://cdn.example/x?Signature=secret").unwrap()).unwrap_err();
        assert!(!error.to_string().contains("secret"));
    }

    #[tokio::test]
    async fn a_name_of_a_private_address_is_not_connected_to() {
        let resolver = PublicResolver { proxies: Vec::new() };
        assert!(resolver.resolve("localhost".parse().unwrap()).await.is_err());
        let resolver = PublicResolver { proxies: vec!["localhost".into()] };
        assert!(resolver.resolve("localhost".parse().unwrap()).await.unwrap().count() > 0);
    }
}
