//! Which addresses of a connection string are left to try once some were silent. Pure but for [`resolve`]; called by `connect` only.

use std::fmt;
use std::net::{IpAddr, ToSocketAddrs};

/// One host of the list in a connection string; what is empty is up to libpq.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) host: String,
    pub(super) hostaddr: String,
    pub(super) port: String,
}

/// What libpq is connecting to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Address {
    /// As the list has it: a name, an address, or the directory of a socket.
    pub(super) host: String,
    /// What the name stands for; empty for a socket.
    pub(super) hostaddr: String,
    pub(super) port: String,
}

impl Address {
    fn is_of(&self, entry: &Entry) -> bool {
        let host = if entry.host.is_empty() {
            &entry.hostaddr
        } else {
            &entry.host
        };
        // An entry that names nothing is the default host, whatever libpq says that it is.
        (host.is_empty() || *host == self.host)
            && (entry.hostaddr.is_empty() || entry.hostaddr == self.hostaddr)
            && (entry.port.is_empty() || entry.port == self.port)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.host)?;
        if !self.hostaddr.is_empty() && self.hostaddr != self.host {
            write!(f, " ({})", self.hostaddr)?;
        }
        Ok(())
    }
}

/// The lists of a connection string, side by side as libpq reads them: one port goes for all.
pub(super) fn entries(hosts: &str, hostaddrs: &str, ports: &str) -> Vec<Entry> {
    let [hosts, hostaddrs, ports] = [hosts, hostaddrs, ports].map(|list| list.split(',').collect::<Vec<_>>());
    let nth = |list: &[&str], index: usize| list.get(index).copied().unwrap_or_default().to_owned();
    (0..hosts.len().max(hostaddrs.len()))
        .map(|index| Entry {
            host: nth(&hosts, index),
            hostaddr: nth(&hostaddrs, index),
            port: nth(&ports, if ports.len() == 1 { 0 } else { index }),
        })
        .collect()
}

/// What is left of the list without the addresses that were silent.
pub(super) fn remaining(
    entries: &[Entry],
    silent: &[Address],
    resolve: impl Fn(&str) -> Vec<String>,
) -> Vec<Entry> {
    let mut left = Vec::new();
    for entry in entries {
        let its: Vec<&Address> = silent.iter().filter(|address| address.is_of(entry)).collect();
        if its.is_empty() {
            left.push(entry.clone());
        } else if entry.hostaddr.is_empty() && its.iter().all(|address| !address.hostaddr.is_empty()) {
            // The others that the name stands for.
            let others = resolve(&entry.host)
                .into_iter()
                .filter(|hostaddr| its.iter().all(|address| address.hostaddr != *hostaddr));
            left.extend(others.map(|hostaddr| Entry {
                hostaddr,
                ..entry.clone()
            }));
        }
    }
    left
}

/// What a name stands for, in the order in which it is tried. An address stands for itself.
pub(super) fn resolve(host: &str) -> Vec<String> {
    let mut addresses: Vec<IpAddr> = Vec::new();
    for address in (host, 0).to_socket_addrs().into_iter().flatten() {
        if !addresses.contains(&address.ip()) {
            addresses.push(address.ip());
        }
    }
    addresses.iter().map(ToString::to_string).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(host: &str, hostaddr: &str, port: &str) -> Entry {
        let [host, hostaddr, port] = [host, hostaddr, port].map(str::to_owned);
        Entry { host, hostaddr, port }
    }

    fn address(host: &str, hostaddr: &str, port: &str) -> Address {
        let Entry { host, hostaddr, port } = entry(host, hostaddr, port);
        Address { host, hostaddr, port }
    }

    #[test]
    fn lists_are_read_side_by_side() {
        assert_eq!(entries("a", "", "5432"), [entry("a", "", "5432")]);
        assert_eq!(
            entries("a,b", ",1.2.3.4", "1,2"),
            [entry("a", "", "1"), entry("b", "1.2.3.4", "2")]
        );
        assert_eq!(entries("a,b", "", "5").last(), Some(&entry("b", "", "5")));
        assert_eq!(
            entries("", "1.2.3.4,::1", "5").last(),
            Some(&entry("", "::1", "5"))
        );
    }

    /// The story: all addresses of a name shared one deadline, so that a name whose first address is silent never connected.
    #[test]
    fn the_other_addresses_of_a_name_are_tried() {
        let resolve = |_: &str| vec!["::1".to_owned(), "10.0.0.1".into(), "10.0.0.2".into()];
        let all = entries("db,/run", "", "5432");
        let mut silent = vec![address("db", "::1", "5432")];
        let left = remaining(&all, &silent, resolve);
        assert_eq!(
            left,
            [
                entry("db", "10.0.0.1", "5432"),
                entry("db", "10.0.0.2", "5432"),
                entry("/run", "", "5432")
            ]
        );
        silent.push(address("db", "10.0.0.1", "5432"));
        silent.push(address("/run", "", "5432"));
        assert_eq!(
            remaining(&all, &silent, resolve),
            [entry("db", "10.0.0.2", "5432")]
        );
        silent.push(address("db", "10.0.0.2", "5432"));
        assert_eq!(remaining(&all, &silent, resolve), []);
    }

    #[test]
    fn an_address_that_was_named_and_the_default_host_have_no_others() {
        let resolve = |_: &str| vec!["10.0.0.9".to_owned()];
        let named = entries("db,db", "10.0.0.1,10.0.0.2", "1");
        let left = remaining(&named, &[address("db", "10.0.0.1", "1")], resolve);
        assert_eq!(left, [entry("db", "10.0.0.2", "1")]);
        let default = entries("", "", "5432");
        assert_eq!(remaining(&default, &[address("/tmp", "", "5432")], resolve), []);
    }
}
