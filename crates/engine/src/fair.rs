//! Who goes next: weighted fair share over tenants, then priority, then age.
//!
//! Owns the waiting queues and the virtual token counters (Sheng et al., "Fairness in Serving Large Language
//! Models", 2024): a tenant's counter grows by tokens / weight as they are computed, the lowest counter goes
//! next, and a tenant that was idle starts at the level of the others, so that idleness earns no credit. It
//! never decides whether what goes next fits.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};

use crate::ids::TenantId;
use crate::slab::Slab;

/// Resolution of a virtual counter: one token at weight 1.
const TOKEN: u64 = 1 << 20;

/// Idle tenants whose counter is ahead of the others are remembered, up to this many.
const MAX_IDLE: usize = 4096;

/// Place in a tenant's queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    priority: Reverse<i32>,
    pub(crate) arrival: u64,
    choice: u32,
}

impl Place {
    pub(crate) fn new(priority: i32, arrival: u64, choice: u32) -> Self {
        Self { priority: Reverse(priority), arrival, choice }
    }
}

/// One tenant that has, or lately had, sequences.
#[derive(Debug)]
pub(crate) struct Tenant {
    id: TenantId,
    weight: u64,
    /// Virtual time: tokens served, divided by the weight, in units of `1 / TOKEN`.
    served: u64,
    queue: BTreeMap<Place, u32>,
    /// Sequences that wait, run or drain.
    sequences: u32,
    /// References to blocks that its sequences hold.
    pub(crate) blocks: u64,
    /// Running sequences that may be preempted.
    pub(crate) preemptible: u32,
}

impl Tenant {
    /// The virtual counter.
    pub(crate) fn served(&self) -> u64 {
        self.served
    }

    /// Whether this tenant holds more blocks for its weight than the other.
    fn over(&self, other: &Self) -> bool {
        u128::from(self.blocks) * u128::from(other.weight)
            > u128::from(other.blocks) * u128::from(self.weight)
    }
}

#[derive(Debug, Default)]
pub(crate) struct FairShare {
    tenants: Slab<Tenant>,
    by_id: HashMap<TenantId, u32>,
    /// Lowest counter among tenants with work, as far as it ever got.
    level: u64,
    waiting: usize,
    /// Tenants without sequences, for the bound on what is remembered.
    idle: usize,
    /// Tenants passed over during one round of admission.
    skipped: Vec<u32>,
}

impl FairShare {
    pub(crate) fn waiting(&self) -> usize {
        self.waiting
    }

    pub(crate) fn tenant(&self, index: u32) -> &Tenant {
        &self.tenants[index]
    }

    pub(crate) fn tenant_mut(&mut self, index: u32) -> &mut Tenant {
        &mut self.tenants[index]
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, &Tenant)> {
        self.tenants.iter()
    }

    /// Finds or makes the tenant of a new request, for `sequences` of them.
    pub(crate) fn join(&mut self, id: TenantId, weight: u32, sequences: u32) -> u32 {
        self.raise_level();
        let level = self.level;
        let index = match self.by_id.get(&id) {
            Some(&index) => index,
            None => {
                let tenant = Tenant {
                    id,
                    weight: 1,
                    served: level,
                    queue: BTreeMap::new(),
                    sequences: 0,
                    blocks: 0,
                    preemptible: 0,
                };
                let index = self.tenants.insert(tenant);
                self.by_id.insert(id, index);
                self.idle += 1;
                index
            }
        };
        let tenant = &mut self.tenants[index];
        if tenant.sequences == 0 {
            self.idle -= 1;
            tenant.served = tenant.served.max(level);
        }
        tenant.weight = u64::from(weight.max(1));
        tenant.sequences += sequences;
        index
    }

    /// One of its sequences is gone.
    pub(crate) fn leave(&mut self, index: u32) {
        let tenant = &mut self.tenants[index];
        tenant.sequences -= 1;
        if tenant.sequences == 0 {
            self.idle += 1;
            self.raise_level();
            self.forget_idle();
        }
    }

    /// Idle tenants are forgotten once forgetting makes no difference, or when there are too many of them.
    fn forget_idle(&mut self) {
        if self.idle <= MAX_IDLE && self.idle * 2 <= self.tenants.len() {
            return;
        }
        let level = if self.idle > MAX_IDLE { u64::MAX } else { self.level };
        let gone: Vec<u32> = self
            .tenants
            .iter()
            .filter(|(_, tenant)| tenant.sequences == 0 && tenant.served <= level)
            .map(|(index, _)| index)
            .collect();
        for index in gone {
            let tenant = self.tenants.remove(index);
            self.by_id.remove(&tenant.id);
            self.idle -= 1;
        }
    }

    fn raise_level(&mut self) {
        let active = self.tenants.iter().filter(|(_, tenant)| tenant.sequences > 0);
        if let Some(lowest) = active.map(|(_, tenant)| tenant.served).min() {
            self.level = self.level.max(lowest);
        }
    }

    pub(crate) fn enqueue(&mut self, tenant: u32, place: Place, sequence: u32) {
        let before = self.tenants[tenant].queue.insert(place, sequence);
        debug_assert!(before.is_none(), "two sequences in one place of a queue");
        self.waiting += 1;
    }

    pub(crate) fn dequeue(&mut self, tenant: u32, place: Place) {
        let before = self.tenants[tenant].queue.remove(&place);
        debug_assert!(before.is_some(), "a waiting sequence is in its tenant's queue");
        self.waiting -= 1;
    }

    /// Charges computed tokens.
    pub(crate) fn charge(&mut self, tenant: u32, tokens: u32) {
        let tenant = &mut self.tenants[tenant];
        tenant.served = tenant.served.saturating_add(u64::from(tokens) * TOKEN / tenant.weight);
    }

    /// By how many tokens at weight 1 a tenant's counter is ahead of another's.
    pub(crate) fn lead(&self, tenant: u32, other: u32) -> u64 {
        self.tenants[tenant].served.saturating_sub(self.tenants[other].served) / TOKEN
    }

    /// Forgets whom the last round passed over.
    pub(crate) fn begin_round(&mut self) {
        self.skipped.clear();
    }

    /// Passes over a tenant for the rest of the round.
    pub(crate) fn skip(&mut self, tenant: u32) {
        self.skipped.push(tenant);
    }

    /// The sequence that goes next: of the tenant with the lowest counter, the oldest of the highest priority.
    pub(crate) fn next(&self) -> Option<u32> {
        if self.waiting == 0 {
            return None;
        }
        self.tenants
            .iter()
            .filter(|(index, _)| !self.skipped.contains(index))
            .filter_map(|(_, tenant)| tenant.queue.first_key_value().map(|entry| (tenant.served, entry)))
            .min_by_key(|(served, (place, _))| (*served, place.arrival))
            .map(|(_, (_, &sequence))| sequence)
    }

    /// The tenant furthest over its fair share of blocks, among those with a sequence that may be preempted:
    /// shares are proportional to weights, so it is the one with the most blocks for its weight.
    pub(crate) fn most_over(&self, excluded: &[u32]) -> Option<u32> {
        let mut most: Option<(u32, &Tenant)> = None;
        for (index, tenant) in self.tenants.iter() {
            if tenant.preemptible > 0
                && !excluded.contains(&index)
                && most.is_none_or(|(_, other)| tenant.over(other))
            {
                most = Some((index, tenant));
            }
        }
        most.map(|(index, _)| index)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// Serves `rounds` sequences of 10 tokens each and returns how many each tenant had.
    fn serve(fair: &mut FairShare, tenants: &[u32], rounds: usize) -> Vec<usize> {
        let mut counts = vec![0; tenants.len()];
        for _ in 0..rounds {
            let sequence = fair.next().unwrap();
            let owner = sequence / 1000;
            counts[owner as usize] += 1;
            fair.charge(tenants[owner as usize], 10);
            let place = *fair.tenants[tenants[owner as usize]].queue.first_key_value().unwrap().0;
            fair.dequeue(tenants[owner as usize], place);
        }
        counts
    }

    fn fill(fair: &mut FairShare, tenant: u32, owner: u32, count: u32) {
        for i in 0..count {
            fair.enqueue(tenant, Place::new(0, u64::from(owner * 1000 + i), 0), owner * 1000 + i);
        }
    }

    #[test]
    fn shares_follow_weights() {
        let mut fair = FairShare::default();
        let tenants = [fair.join(TenantId(7), 1, 500), fair.join(TenantId(8), 3, 500)];
        fill(&mut fair, tenants[0], 0, 500);
        fill(&mut fair, tenants[1], 1, 500);
        assert_eq!(serve(&mut fair, &tenants, 400), [100, 300]);
    }

    #[test]
    fn idleness_earns_no_credit() {
        let mut fair = FairShare::default();
        let busy = fair.join(TenantId(1), 1, 1000);
        fill(&mut fair, busy, 0, 1000);
        serve(&mut fair, &[busy], 500);
        let late = fair.join(TenantId(2), 1, 500);
        fill(&mut fair, late, 1, 500);
        let counts = serve(&mut fair, &[busy, late], 200);
        assert_eq!(counts, [100, 100]);
    }

    #[test]
    fn a_short_absence_does_not_wipe_the_slate() {
        let mut fair = FairShare::default();
        let (greedy, modest) = (fair.join(TenantId(1), 1, 1), fair.join(TenantId(2), 1, 1));
        fair.charge(greedy, 100);
        fair.leave(greedy);
        let again = fair.join(TenantId(1), 1, 1);
        fair.enqueue(again, Place::new(0, 1, 0), 0);
        fair.enqueue(modest, Place::new(0, 2, 0), 1000);
        assert_eq!(fair.next(), Some(1000));
    }

    #[test]
    fn priority_then_age_within_a_tenant() {
        let mut fair = FairShare::default();
        let tenant = fair.join(TenantId(1), 1, 4);
        fair.enqueue(tenant, Place::new(0, 1, 0), 10);
        fair.enqueue(tenant, Place::new(5, 3, 0), 11);
        fair.enqueue(tenant, Place::new(5, 2, 1), 12);
        fair.enqueue(tenant, Place::new(5, 2, 0), 13);
        let mut order = Vec::new();
        while let Some(sequence) = fair.next() {
            let place = *fair.tenants[tenant].queue.first_key_value().unwrap().0;
            fair.dequeue(tenant, place);
            order.push(sequence);
        }
        assert_eq!(order, [13, 12, 11, 10]);
    }

    #[test]
    fn the_most_over_is_by_weight() {
        let mut fair = FairShare::default();
        let (light, heavy) = (fair.join(TenantId(1), 1, 1), fair.join(TenantId(2), 4, 1));
        for (tenant, blocks) in [(light, 10), (heavy, 30)] {
            fair.tenant_mut(tenant).blocks = blocks;
            fair.tenant_mut(tenant).preemptible = 1;
        }
        assert_eq!(fair.most_over(&[]), Some(light));
        assert_eq!(fair.most_over(&[light]), Some(heavy));
        fair.tenant_mut(heavy).blocks = 50;
        assert_eq!(fair.most_over(&[]), Some(heavy));
        fair.tenant_mut(heavy).preemptible = 0;
        assert_eq!(fair.most_over(&[]), Some(light));
    }

    #[test]
    fn tenants_are_not_remembered_for_ever() {
        let mut fair = FairShare::default();
        let stays = fair.join(TenantId(u64::MAX), 1, 1);
        for id in 0..3 * MAX_IDLE as u64 {
            let tenant = fair.join(TenantId(id), 1, 1);
            fair.charge(tenant, 5);
            fair.leave(tenant);
        }
        assert!(fair.tenants.len() <= MAX_IDLE + 2, "{} tenants", fair.tenants.len());
        assert_eq!(fair.by_id.len(), fair.tenants.len());
        fair.leave(stays);
    }
}
