//! Random lives of requests under faults and crashes, against what their clients saw.
//!
//! A tape is what a client got: tokens that the handle permitted, and an end that was durable. After each crash
//! and at the end, the ledger is read by itself and held against the tapes:
//!
//! * I1 a request whose first byte left has exactly one row; * I2 an end that was seen is in the row, to the token;
//! * I3 after an abort, tape <= row <= generated; * I4 after a crash, tape - row <= 16, and 0 where the end was seen;
//! * I5 a refused request has no row, or one without output; * I6 sums agree with the rows and with the counters;
//! * I8 starting again changes nothing.

use proptest::prelude::*;

use super::*;
use crate::store::UsageQuery;
use crate::store::tests::history::runner;

#[derive(Clone, Debug)]
enum Op {
    Open,
    /// Generates tokens and sends what may leave.
    Go {
        stream: usize,
        tokens: u64,
    },
    End {
        stream: usize,
        back: u64,
    },
    Abort {
        stream: usize,
    },
    Turn,
    Pass {
        millis: u64,
    },
    Fault {
        after: u32,
        took_effect: bool,
        for_good: bool,
    },
    Heal,
    Crash,
    /// Another replica believes this one dead.
    GiveUp,
}

fn op() -> impl Strategy<Value = Op> {
    let n = 0..1000usize;
    prop_oneof![
        4 => Just(Op::Open),
        10 => (n.clone(), 1..25u64).prop_map(|(stream, tokens)| Op::Go { stream, tokens }),
        3 => (n.clone(), 0..4u64).prop_map(|(stream, back)| Op::End { stream, back }),
        2 => n.prop_map(|stream| Op::Abort { stream }),
        8 => Just(Op::Turn),
        3 => (1..4000u64).prop_map(|millis| Op::Pass { millis }),
        2 => (0..30u32, any::<bool>(), any::<bool>())
            .prop_map(|(after, took_effect, for_good)| Op::Fault { after, took_effect, for_good }),
        2 => Just(Op::Heal),
        1 => Just(Op::Crash),
        1 => Just(Op::GiveUp),
    ]
}

/// One request and its client.
struct Tape {
    n: u64,
    /// Gone when the process died.
    open: Option<Open>,
    generated: u64,
    /// Tokens that the client got; `None` if not even the headers.
    got: Option<u64>,
    /// Tokens at the end that the server gave.
    end: Option<u64>,
    /// Whether the client saw it.
    saw_end: bool,
    aborted: bool,
    crashed: bool,
}

impl Tape {
    /// The server sends what it may.
    fn send(&mut self) {
        let Some(open) = &self.open else { return };
        let Some(permitted) = open.permitted() else { return };
        let to_send = self.end.unwrap_or(self.generated);
        if !self.aborted {
            self.got = Some(self.got.unwrap_or(0).max(to_send.min(permitted)));
            self.saw_end = self.end.is_some() && open.is_closed();
            if self.saw_end {
                self.got = self.end;
            }
        }
    }
}

struct World {
    rig: Rig,
    tapes: Vec<Tape>,
    refused: Vec<u64>,
    next: u64,
}

impl World {
    fn apply(&mut self, op: &Op) {
        match *op {
            Op::Open => self.open(),
            Op::Go { stream, tokens } => {
                if let Some(tape) = self.pick(stream) {
                    tape.generated += tokens;
                    tape.open.as_ref().unwrap().checkpoint(&counts(tape.generated));
                }
            }
            Op::End { stream, back } => {
                if let Some(tape) = self.pick(stream) {
                    // A stop string takes back tokens that have not left.
                    let end = tape.generated.saturating_sub(back).max(tape.got.unwrap_or(0));
                    tape.end = Some(end);
                    tape.open.as_ref().unwrap().close(&ended(end));
                }
            }
            Op::Abort { stream } => {
                if let Some(tape) = self.pick(stream) {
                    tape.aborted = true;
                    tape.end = Some(tape.generated);
                    let outcome = Outcome { finish: Finish::Abort, ..ended(tape.generated) };
                    tape.open.as_ref().unwrap().close(&outcome);
                }
            }
            Op::Turn => {
                self.rig.turn();
            }
            Op::Pass { millis } => self.rig.pass(Duration::from_millis(millis)),
            Op::Fault { after, took_effect, for_good } => {
                self.rig.set(Plan { after: Some(after), took_effect, for_good, calls: 0 });
            }
            Op::Heal => self.rig.set(UP),
            Op::Crash => self.crash(),
            Op::GiveUp => self.give_up(),
        }
        self.tapes.iter_mut().for_each(Tape::send);
    }

    fn open(&mut self) {
        self.next += 1;
        let n = self.next;
        match self.rig.open(n) {
            Ok(open) => self.tapes.push(Tape {
                n,
                open: Some(open),
                generated: 0,
                got: None,
                end: None,
                saw_end: false,
                aborted: false,
                crashed: false,
            }),
            Err(_) => self.refused.push(n),
        }
    }

    fn pick(&mut self, stream: usize) -> Option<&mut Tape> {
        let mut live: Vec<&mut Tape> =
            self.tapes.iter_mut().filter(|tape| tape.open.is_some() && tape.end.is_none()).collect();
        let count = live.len();
        (count > 0).then(|| live.swap_remove(stream % count))
    }

    fn crash(&mut self) {
        for tape in &mut self.tapes {
            if let Some(open) = tape.open.take() {
                // What dropping says, nobody hears any more.
                drop(open);
                tape.crashed |= !tape.saw_end;
            }
        }
        // Starting needs the store, or a spool.
        let plan = if self.rig.spool.is_some() { *self.rig.plan.lock().unwrap() } else { UP };
        self.rig.crash(plan);
    }

    fn give_up(&mut self) {
        let Some(owner) = self.rig.committer.owner.clone() else { return };
        let mut other = self.rig.db.connect();
        let by = other.register("other", Duration::from_secs(3600), false).unwrap();
        crate::store::tests::expire(&mut other, &owner);
        while other.recover(&by, 2).unwrap().more {}
        other.release(&by).unwrap();
    }

    /// Everything is well again, and at rest.
    fn heal(&mut self) {
        self.rig.set(UP);
        self.rig.pass(Duration::from_secs(60));
        self.rig.settle();
        self.rig.pass(Duration::from_secs(60));
        self.rig.settle();
        self.tapes.iter_mut().for_each(Tape::send);
        assert_eq!(self.rig.shared.health(), Health::Ok);
    }

    fn check(&mut self) {
        let rows = self.rig.rows();
        let mut store = self.rig.db.connect();
        assert_eq!(sound(&mut store).rows, rows.len() as u64);
        for tape in &self.tapes {
            let row = rows.get(&format!("R{:06}", tape.n));
            let Some(got) = tape.got else {
                // Nothing left. A row may be there all the same, and says what was done.
                assert!(row.is_none_or(|row| row.completion_tokens <= tape.generated));
                continue;
            };
            let row = row.unwrap_or_else(|| panic!("I1: request {} has no row", tape.n));
            if tape.saw_end {
                assert_eq!(Some(row.completion_tokens), tape.end, "I2: request {}", tape.n);
                assert_eq!(row.finish, Finish::Stop);
            } else if tape.crashed {
                assert!(got <= row.completion_tokens + 16, "I4: {got} beyond {row:?}");
            } else if tape.aborted {
                assert!(got <= row.completion_tokens, "I3");
                assert_eq!(row.finish, Finish::Abort);
            }
            assert!(row.completion_tokens <= tape.generated, "I3: never more than was generated");
        }
        for n in &self.refused {
            assert!(!rows.contains_key(&format!("R{n:06}")), "I5: a refused request has a row");
        }
        assert!(rows.len() <= self.tapes.len(), "I1");
        let sums = store.usage(&UsageQuery::ALL).unwrap();
        let total: u64 = rows.values().map(|row| row.completion_tokens).sum();
        assert_eq!(sums.iter().map(|sum| sum.completion_tokens).sum::<u64>(), total, "I6");
        let live = self.tapes.iter().filter(|tape| tape.open.as_ref().is_some_and(|open| !open.is_closed()));
        assert_eq!(self.rig.shared.open.load(Ordering::Acquire), live.count(), "I6");
    }

    fn finish(&mut self) {
        self.heal();
        self.check();
        self.crash();
        self.heal();
        self.check();
        let (rows, spooled) = (self.rig.rows(), self.rig.shared.spooled_bytes.load(Ordering::Acquire));
        assert_eq!(spooled, 0);
        assert!(rows.values().all(|row| row.state == State::Closed));
        self.crash();
        self.heal();
        assert_eq!(self.rig.rows(), rows, "I8");
    }
}

fn lives(spool: Option<u64>, cases: u32) {
    let result = runner(cases).run(&proptest::collection::vec(op(), 1..80), |ops| {
        let rig = Rig::new(config(), spool);
        let mut world = World { rig, tapes: Vec::new(), refused: Vec::new(), next: 0 };
        for op in &ops {
            world.apply(op);
        }
        world.finish();
        Ok(())
    });
    result.unwrap();
}

const CASES: u32 = if cfg!(coverage) { 20 } else { 60 };

#[test]
fn tapes_and_rows_agree_without_a_spool() {
    lives(None, CASES);
}

#[test]
fn tapes_and_rows_agree_with_a_spool() {
    lives(Some(1 << 20), CASES);
}

#[test]
fn tapes_and_rows_agree_with_a_small_spool() {
    lives(Some(6 * MAX_ROW_BYTES), CASES);
}
