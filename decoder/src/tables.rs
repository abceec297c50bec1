//! The plans of the tables that the stream has met, kept until Postgres says that a table may have changed.

use std::cell::RefCell;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::rc::{Rc, Weak};

use crate::error::Refusal;
use crate::ffi::memory::Context;
use crate::ffi::relation::{self, Rel};
use crate::plan::Plan;

/// What is known of a table.
pub enum Table {
    /// Neither it nor a table that it is a partition of has a label.
    Unconfigured,
    Configured(Box<Plan>),
    /// Its label does not fit it.
    Broken(Refusal),
}

/// A cache of [`Table`]s by `pg_class.oid`.
pub struct Tables {
    known: HashMap<u32, Table, BuildHasherDefault<OidHasher>>,
    /// Tables that Postgres said to look at anew; filled by [`invalidate`].
    stale: Rc<RefCell<Stale>>,
    context: Context,
    historic: bool,
}

#[derive(Default)]
enum Stale {
    #[default]
    Nothing,
    Some(Vec<u32>),
    Everything,
}

impl Tables {
    /// An empty cache whose plans live in `context`. `historic` tells that look-ups happen in decoding callbacks.
    pub fn new(context: Context, historic: bool) -> Self {
        let stale = Rc::default();
        LISTENERS.with_borrow_mut(|listeners| {
            listeners.retain(|listener| listener.strong_count() > 0);
            listeners.push(Rc::downgrade(&stale));
        });
        Self {
            known: HashMap::default(),
            stale,
            context,
            historic,
        }
    }

    /// What is known of a table, looked up if need be.
    #[inline]
    pub fn get(&mut self, table: &Rel) -> &mut Table {
        if !matches!(*self.stale.borrow(), Stale::Nothing) {
            self.forget_stale();
        }
        let (historic, context) = (self.historic, self.context);
        self.known.entry(u32::from(table.oid())).or_insert_with(|| {
            match Plan::build(table, historic, context) {
                Ok(Some(plan)) => Table::Configured(Box::new(plan)),
                Ok(None) => Table::Unconfigured,
                Err(refusal) => Table::Broken(refusal),
            }
        })
    }

    /// Whether a table need not be looked up. What Postgres made itself has no label.
    pub fn knows(&mut self, table: u32) -> bool {
        if table < pgrx::pg_sys::FirstNormalObjectId {
            return true;
        }
        if !matches!(*self.stale.borrow(), Stale::Nothing) {
            self.forget_stale();
        }
        self.known.contains_key(&table)
    }

    /// Looks up a table by its oid, as capture does: not if it is gone, nor if that would wait for a lock. The query that reads a
    /// partition has no lock on the table that carries the label.
    pub fn look_up(&mut self, table: u32) {
        let oid = pgrx::pg_sys::Oid::from(table);
        // Most tables have no label, and a query may read a thousand partitions of one.
        let Some(root) = relation::labelled(oid) else {
            self.known.entry(table).or_insert(Table::Unconfigured);
            return;
        };
        let Some(relation) = Rel::open_at_once(oid) else {
            return;
        };
        let _root = if root == oid {
            None
        } else {
            match Rel::open_at_once(root) {
                None => return,
                root => root,
            }
        };
        self.get(&relation);
    }

    /// What is known of a table, as of when [`Tables::knows`] was asked.
    pub fn known(&mut self, table: u32) -> Option<&mut Table> {
        self.known.get_mut(&table)
    }

    /// A partition's plan also depends on the table that carries the label, so both oids count.
    fn forget_stale(&mut self) {
        let stale = std::mem::take(&mut *self.stale.borrow_mut());
        let dependents: Vec<u32> = match stale {
            Stale::Nothing => return,
            Stale::Everything => self.known.keys().copied().collect(),
            Stale::Some(oids) => self
                .known
                .iter()
                .filter(|(oid, table)| oids.contains(oid) || depends_on(table, &oids))
                .map(|(oid, _)| *oid)
                .collect(),
        };
        for oid in dependents {
            if let Some(Table::Configured(plan)) = self.known.remove(&oid) {
                plan.release();
            }
        }
    }
}

/// Whether what is known of a table was read from one of these tables too. What made a table broken may be any of them.
fn depends_on(table: &Table, oids: &[u32]) -> bool {
    match table {
        Table::Configured(plan) => oids.contains(&plan.relation.oid),
        Table::Broken(_) => true,
        Table::Unconfigured => false,
    }
}

thread_local! {
    static LISTENERS: RefCell<Vec<Weak<RefCell<Stale>>>> = const { RefCell::new(Vec::new()) };
}

/// More stale tables than this are not told apart.
const STALE_MAX: usize = 256;

/// Notes that a table may have changed; `None`: any of them. Called by the relation cache, at moments when nothing may be
/// looked up.
pub fn invalidate(table: Option<u32>) {
    LISTENERS.with_borrow(|listeners| {
        for listener in listeners.iter().filter_map(Weak::upgrade) {
            let Ok(mut stale) = listener.try_borrow_mut() else {
                continue;
            };
            *stale = match (std::mem::take(&mut *stale), table) {
                (Stale::Nothing, Some(oid)) => Stale::Some(vec![oid]),
                (Stale::Some(mut oids), Some(oid)) if oids.len() < STALE_MAX => {
                    oids.push(oid);
                    Stale::Some(oids)
                }
                _ => Stale::Everything,
            };
        }
    });
}

/// Oids are well spread numbers; a multiplication suffices.
#[derive(Default)]
struct OidHasher(u64);

impl Hasher for OidHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        }
    }

    fn write_u32(&mut self, oid: u32) {
        self.0 = u64::from(oid).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    }
}
