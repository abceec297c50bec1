//! Which faults there are, whom each befalls, and in which order those of a round may be done.

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;

use Victim::{Cache, Database, Link, Mirror};

/// Whom a fault befalls.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Victim {
    Mirror,
    Link,
    Database,
    Cache,
}

macro_rules! faults {
    ($($fault:ident: $victim:ident,)*) => {
        /// What may break. Of what befalls the same victim, what comes first is done first: a server that is down cannot be told
        /// anything.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Fault {
            $($fault,)*
        }

        pub const FAULTS: &[Fault] = &[$(Fault::$fault,)*];

        impl Fault {
            fn victim(self) -> Victim {
                match self {
                    $(Fault::$fault => $victim,)*
                }
            }
        }
    };
}

faults! {
    SinkKilled: Mirror,
    SinkStopped: Mirror,
    SinkFrozen: Mirror,
    SecondSink: Mirror,
    LinkCut: Link,
    LinkSilent: Link,
    LinkSlow: Link,
    Trapped: Link,
    WalsenderTerminated: Database,
    PostgresBusy: Database,
    HugeTransaction: Database,
    SchemaChanged: Database,
    TypesChanged: Database,
    DecoderFails: Database,
    LoginTaken: Database,
    SlotDropped: Database,
    SlotInvalidated: Database,
    PostgresPutBack: Database,
    WalsenderFrozen: Database,
    PostgresRestarted: Database,
    KeyTaken: Cache,
    RedisFailedOver: Cache,
    RedisEmptied: Cache,
    RedisFull: Cache,
    RedisReadOnly: Cache,
    RedisCannotSave: Cache,
    RedisPasswordChanged: Cache,
    RedisPaused: Cache,
    RedisClientsKilled: Cache,
    RedisScriptsFlushed: Cache,
    RedisScriptBusy: Cache,
    RedisFrozen: Cache,
    RedisRestarted: Cache,
    RedisTailLost: Cache,
}

/// A round's faults in the order in which they are done: any that each victim's allows for.
pub fn in_order(mut faults: Vec<Fault>, rng: &mut StdRng) -> Vec<Fault> {
    faults.sort_unstable();
    let mut ordered = Vec::new();
    while let Some(any) = faults.choose(rng) {
        let victim = any.victim();
        let next = faults.iter().position(|fault| fault.victim() == victim).unwrap();
        ordered.push(faults.remove(next));
    }
    ordered
}
