//! Who has been served how much: one virtual token counter per tenant (Sheng et al. 2024, "Fairness in Serving Large
//! Language Models").
//!
//! A tenant's counter grows by every token that is scheduled for it; among tenants with waiting requests the one
//! with the lowest counter is next. A tenant that comes back with an empty queue is lifted to the level at which
//! the others are served, so idle time earns no credit.

use std::collections::BTreeMap;

use crate::TenantId;

/// Tenants without a live sequence whose counters are remembered. Beyond it the one that was served least is
/// forgotten: it loses least by being lifted when it comes back.
const MAX_IDLE: u32 = 1024;

/// Place of a tenant in the table, as long as it has a live sequence.
pub(crate) type TenantIndex = u32;

#[derive(Debug)]
struct Tenant {
    id: TenantId,
    /// Tokens scheduled, and lifts.
    counter: u64,
    num_live: u32,
    num_waiting: u32,
    waiting_tokens: u64,
}

/// See the module's text.
#[derive(Debug, Default)]
pub(crate) struct TenantTable {
    by_id: BTreeMap<TenantId, TenantIndex>,
    tenants: Vec<Tenant>,
    vacant: Vec<TenantIndex>,
    num_live: u32,
    num_waiting: u32,
    /// Counter at which somebody was admitted last.
    level: u64,
}

impl TenantTable {
    /// Tenants with a live sequence.
    pub(crate) fn num_live(&self) -> u32 {
        self.num_live
    }

    /// Tenants with a waiting sequence, `id` counted in whether it has one or not.
    pub(crate) fn num_waiting_with(&self, id: TenantId) -> u32 {
        let waits = self.by_id.get(&id).is_some_and(|&index| self.tenants[index as usize].num_waiting > 0);
        self.num_waiting + u32::from(!waits)
    }

    /// Tokens that the tenant's waiting sequences bring.
    pub(crate) fn waiting_tokens(&self, id: TenantId) -> u64 {
        self.by_id.get(&id).map_or(0, |&index| self.tenants[index as usize].waiting_tokens)
    }

    /// Where the tenant stands in the table, if it is known.
    pub(crate) fn index_of(&self, id: TenantId) -> Option<TenantIndex> {
        self.by_id.get(&id).copied()
    }

    pub(crate) fn counter(&self, index: TenantIndex) -> u64 {
        self.tenants[index as usize].counter
    }

    /// A sequence of the tenant begins to live.
    pub(crate) fn enter(&mut self, id: TenantId) -> TenantIndex {
        let index = match self.by_id.get(&id) {
            Some(&index) => index,
            None => self.insert(id),
        };
        let tenant = &mut self.tenants[index as usize];
        tenant.num_live += 1;
        self.num_live += u32::from(tenant.num_live == 1);
        index
    }

    /// A sequence of the tenant has ended.
    pub(crate) fn leave(&mut self, index: TenantIndex) {
        let tenant = &mut self.tenants[index as usize];
        tenant.num_live -= 1;
        self.num_live -= u32::from(tenant.num_live == 0);
    }

    /// A sequence of the tenant begins to wait.
    pub(crate) fn wait(&mut self, index: TenantIndex, num_tokens: u64) {
        let level = self.level();
        let tenant = &mut self.tenants[index as usize];
        if tenant.num_waiting == 0 {
            tenant.counter = tenant.counter.max(level);
            self.num_waiting += 1;
        }
        tenant.num_waiting += 1;
        tenant.waiting_tokens += num_tokens;
    }

    /// A sequence of the tenant waits no more.
    pub(crate) fn stop_waiting(&mut self, index: TenantIndex, num_tokens: u64) {
        let tenant = &mut self.tenants[index as usize];
        tenant.num_waiting -= 1;
        tenant.waiting_tokens -= num_tokens;
        self.num_waiting -= u32::from(tenant.num_waiting == 0);
    }

    /// The tenant is next: the others who come back are lifted to where it stands.
    pub(crate) fn admit(&mut self, index: TenantIndex) {
        self.level = self.level.max(self.tenants[index as usize].counter);
    }

    /// Tokens were scheduled for the tenant.
    pub(crate) fn charge(&mut self, index: TenantIndex, num_tokens: u32) {
        self.tenants[index as usize].counter += u64::from(num_tokens);
    }

    /// Where a tenant begins that has nothing waiting: level with the least served of those who wait.
    fn level(&self) -> u64 {
        if self.num_waiting == 0 {
            return self.level;
        }
        let waiting = self.tenants.iter().filter(|tenant| tenant.num_waiting > 0);
        waiting.map(|tenant| tenant.counter).min().unwrap_or(self.level)
    }

    fn insert(&mut self, id: TenantId) -> TenantIndex {
        let num_known = self.by_id.len() as u32;
        if num_known - self.num_live >= MAX_IDLE {
            let idle = self.by_id.values().copied().filter(|&index| self.tenants[index as usize].num_live == 0);
            let least = idle.min_by_key(|&index| self.tenants[index as usize].counter);
            let index = least.expect("MAX_IDLE is not 0");
            self.by_id.remove(&self.tenants[index as usize].id);
            self.vacant.push(index);
        }
        let tenant = Tenant { id, counter: 0, num_live: 0, num_waiting: 0, waiting_tokens: 0 };
        let index = match self.vacant.pop() {
            Some(index) => {
                self.tenants[index as usize] = tenant;
                index
            }
            None => {
                self.tenants.push(tenant);
                self.tenants.len() as u32 - 1
            }
        };
        self.by_id.insert(id, index);
        index
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_time_earns_no_credit() {
        let mut table = TenantTable::default();
        let busy = table.enter(TenantId(1));
        table.wait(busy, 10);
        table.charge(busy, 1_000);
        let late = table.enter(TenantId(2));
        table.wait(late, 10);
        assert_eq!(table.counter(late), 1_000);
        assert_eq!((table.num_waiting_with(TenantId(2)), table.num_waiting_with(TenantId(3))), (2, 3));
    }

    #[test]
    fn a_debt_outlives_an_empty_queue() {
        let mut table = TenantTable::default();
        let heavy = table.enter(TenantId(1));
        table.wait(heavy, 10);
        let light = table.enter(TenantId(2));
        table.wait(light, 10);
        table.charge(heavy, 1_000);
        table.stop_waiting(heavy, 10);
        table.leave(heavy);
        assert_eq!(table.enter(TenantId(1)), heavy);
        table.wait(heavy, 10);
        assert_eq!((table.counter(heavy), table.counter(light)), (1_000, 0));
    }

    #[test]
    fn memory_is_bounded() {
        let mut table = TenantTable::default();
        for id in 0..3 * MAX_IDLE {
            let index = table.enter(TenantId(id));
            table.charge(index, id);
            table.leave(index);
        }
        assert_eq!(table.by_id.len() as u32, MAX_IDLE);
        assert!(table.tenants.len() as u32 <= MAX_IDLE);
        assert!(table.by_id.contains_key(&TenantId(3 * MAX_IDLE - 1)), "who was served most is remembered");
        assert_eq!(table.num_live(), 0);
    }
}
