//! Random histories of replicas against a simple oracle: a list of what was admitted, when, and what it used.
//!
//! What is held against it after every admission: no minute of real time and no day or month of the zone sees more
//! than its limit, and no more requests run at once than may. At the end, when all has been said: what the store
//! counts is what was used, exactly where nobody died, and never less.

use proptest::prelude::*;

use super::*;
use crate::store::tests::history::runner;

#[derive(Clone, Debug)]
enum Op {
    Reserve {
        replica: usize,
        app: usize,
        prompt: u64,
        output: u64,
    },
    Settle {
        which: usize,
        percent: u64,
    },
    Cancel {
        which: usize,
    },
    Drop {
        which: usize,
    },
    Turn {
        replica: usize,
    },
    Pass {
        millis: u64,
    },
    /// The store's clock is set back.
    Back {
        seconds: i64,
    },
    Fault {
        replica: usize,
        after: u32,
        took_effect: bool,
    },
    Down {
        replica: usize,
    },
    Up {
        replica: usize,
    },
    Crash {
        replica: usize,
    },
    Stop {
        replica: usize,
    },
}

fn op() -> impl Strategy<Value = Op> {
    let n = 0..1000usize;
    let pass = prop_oneof![10 => 0..3_000u64, 3 => 0..40_000u64, 1 => 0..7_200_000u64];
    prop_oneof![
        14 => (n.clone(), n.clone(), 0..200u64, 0..1500u64)
            .prop_map(|(replica, app, prompt, output)| Op::Reserve { replica, app, prompt, output }),
        9 => (n.clone(), 0..101u64).prop_map(|(which, percent)| Op::Settle { which, percent }),
        1 => n.clone().prop_map(|which| Op::Cancel { which }),
        1 => n.clone().prop_map(|which| Op::Drop { which }),
        8 => n.clone().prop_map(|replica| Op::Turn { replica }),
        8 => pass.prop_map(|millis| Op::Pass { millis }),
        1 => (1..600i64).prop_map(|seconds| Op::Back { seconds }),
        1 => (n.clone(), 0..30u32, any::<bool>())
            .prop_map(|(replica, after, took_effect)| Op::Fault { replica, after, took_effect }),
        1 => n.clone().prop_map(|replica| Op::Down { replica }),
        2 => n.clone().prop_map(|replica| Op::Up { replica }),
        1 => n.clone().prop_map(|replica| Op::Crash { replica }),
        1 => n.prop_map(|replica| Op::Stop { replica }),
    ]
}

/// Around noon, midnight, a month's end and both changes of the clocks.
const BEGINS: [&str; 5] =
    [NOON, "2026-11-24T22:58:00Z", "2026-11-30T22:59:30Z", "2026-03-28T22:30:00Z", "2026-10-25T00:30:00Z"];
const REPLICAS: usize = 3;

/// What the oracle knows of an admission.
struct Admitted {
    app: usize,
    real: Duration,
    requests: u64,
    /// What it may have used: all it reserved, until something else is known.
    tokens: u64,
    reserved: u64,
    /// The day and the month it counts in; `None` where the application has no such limit.
    day: Option<i64>,
    month: Option<i64>,
    /// Where it runs: the replica's place and life.
    runs: Option<(usize, u32)>,
}

struct Oracle<D> {
    world: World<D>,
    apps: Vec<App>,
    all: Vec<Admitted>,
    /// Those that run, with their place in `all`.
    held: Vec<(usize, Reservation)>,
    lives: [u32; REPLICAS],
    /// Seconds by which the store's clock was set back.
    back: i64,
    exact: bool,
}

/// The day in Paris, reckoned from its offset.
fn day_of(micros: i64) -> i64 {
    let zone = jiff::tz::TimeZone::get("Europe/Paris").unwrap();
    let offset = zone.to_offset(jiff::Timestamp::from_microsecond(micros).unwrap()).seconds();
    (micros.div_euclid(1_000_000) + i64::from(offset)).div_euclid(86_400)
}

impl<D: Database> Oracle<D>
where
    D::Driver: 'static,
{
    fn new(db: D, begins: &str) -> Self {
        let world = World::new(db, 0, config());
        world.now.store(micros(begins), Ordering::SeqCst);
        world.clock.wall.store(micros(begins), Ordering::SeqCst);
        let mut world = world;
        world.replicas = (0..REPLICAS).map(|_| world.replica()).collect();
        let apps = vec![
            application(
                "a",
                "requests_per_minute = 20\ntokens_per_minute = 8000\ntokens_per_day = 30000\n\
                 tokens_per_month = 70000\nconcurrent_requests = 6",
            ),
            application("b", "tokens_per_day = 4000\nconcurrent_requests = 2"),
            application("c", "requests_per_minute = 40\ntokens_per_minute = 20000"),
        ];
        let lives = [0; REPLICAS];
        Self { world, apps, all: Vec::new(), held: Vec::new(), lives, back: 0, exact: true }
    }

    fn apply(&mut self, op: &Op) {
        match *op {
            Op::Reserve { replica, app, prompt, output } => {
                self.reserve(replica % REPLICAS, app % self.apps.len(), demand(prompt, output));
            }
            Op::Settle { which, percent } => {
                if let Some((index, held)) = self.pick(which) {
                    let used = self.all[index].reserved * percent / 100;
                    (self.all[index].tokens, self.all[index].runs) = (used, None);
                    held.settle(used);
                }
            }
            Op::Cancel { which } => {
                if let Some((index, held)) = self.pick(which) {
                    let admitted = &mut self.all[index];
                    (admitted.tokens, admitted.requests, admitted.runs) = (0, 0, None);
                    held.cancel();
                }
            }
            Op::Drop { which } => {
                if let Some((index, held)) = self.pick(which) {
                    self.all[index].runs = None;
                    drop(held);
                }
            }
            Op::Turn { replica } => {
                self.world.turn(replica % REPLICAS);
            }
            Op::Pass { millis } => self.world.pass(Duration::from_millis(millis)),
            Op::Back { seconds } => {
                self.back += seconds;
                self.world.now.fetch_sub(seconds * 1_000_000, Ordering::SeqCst);
            }
            Op::Fault { replica, after, took_effect } => {
                self.world.set(replica % REPLICAS, Plan { after: Some(after), took_effect, ..UP });
            }
            Op::Down { replica } => self.world.set(replica % REPLICAS, DOWN),
            Op::Up { replica } => self.world.set(replica % REPLICAS, UP),
            Op::Crash { replica } => self.replace(replica % REPLICAS),
            Op::Stop { replica } => {
                let replica = replica % REPLICAS;
                self.world.replicas[replica].syncer.farewell();
                self.replace(replica);
            }
        }
    }

    /// A request that runs on a replica that lives.
    fn pick(&mut self, which: usize) -> Option<(usize, Reservation)> {
        (!self.held.is_empty()).then(|| self.held.swap_remove(which % self.held.len()))
    }

    fn reserve(&mut self, replica: usize, app: usize, demand: Demand) {
        let application = self.apps[app].clone();
        let Ok(held) = self.world.reserve(replica, &application, demand) else { return };
        let bucket = |kind: Kind| held.charges.unwrap()[kind.index()].map(|(bucket, _)| bucket);
        let (day, month) = (bucket(Kind::TokensPerDay), bucket(Kind::TokensPerMonth));
        if let Some(day) = day.filter(|_| self.back == 0) {
            assert_eq!(day, day_of(self.world.now.load(Ordering::SeqCst)));
        }
        self.all.push(Admitted {
            app,
            real: self.world.clock.monotonic(),
            requests: 1,
            tokens: demand.tokens(),
            reserved: demand.tokens(),
            day,
            month,
            runs: Some((replica, self.lives[replica])),
        });
        self.held.push((self.all.len() - 1, held));
        self.check(app);
    }

    /// A replica dies, or what it left running is cut off; another takes its place.
    fn replace(&mut self, replica: usize) {
        let life = (replica, self.lives[replica]);
        self.exact = false;
        self.lives[replica] += 1;
        let (dead, held) = std::mem::take(&mut self.held)
            .into_iter()
            .partition(|(index, _)| self.all[*index].runs == Some(life));
        self.held = held;
        for (index, _) in &dead {
            self.all[*index].runs = None;
        }
        let successor = self.world.replica();
        self.world.replicas[replica] = successor;
        // They speak to a process that is gone.
        let _: Vec<(usize, Reservation)> = dead;
    }

    fn check(&self, app: usize) {
        let now = self.world.clock.monotonic();
        let quota = &self.apps[app].quota;
        let sum = |which: &dyn Fn(&Admitted) -> bool, of: fn(&Admitted) -> u64| {
            self.all.iter().filter(|a| a.app == app && which(a)).map(of).sum::<u64>()
        };
        let minute = |a: &Admitted| a.real + Duration::from_secs(60) > now;
        let within = |limit: Option<u64>, used: u64, what: &str| {
            assert!(limit.is_none_or(|limit| used <= limit), "{what}: {used} of {limit:?}");
        };
        within(quota.requests_per_minute, sum(&minute, |a| a.requests), "requests in a minute");
        within(quota.tokens_per_minute, sum(&minute, |a| a.tokens), "tokens in a minute");
        let last = self.all.last().unwrap();
        let day = sum(&|a| a.day == last.day, |a| a.tokens);
        within(quota.tokens_per_day, day, "tokens in a day");
        let month = sum(&|a| a.month == last.month, |a| a.tokens);
        within(quota.tokens_per_month, month, "tokens in a month");
        // A replica that was silent for longer than its lease counts as dead, until it speaks again.
        let alive = |a: &Admitted| {
            let lives = |(replica, life): (usize, u32)| {
                let until = self.world.replicas[replica].shared.book().alive_until;
                life == self.lives[replica] && now < until
            };
            a.runs.is_some_and(lives)
        };
        within(quota.concurrent_requests, sum(&alive, |_| 1), "requests at once");
    }

    /// All has been said, and what is dead is swept.
    fn end(mut self) {
        for replica in 0..REPLICAS {
            self.world.set(replica, UP);
        }
        while let Some((index, held)) = self.held.pop() {
            let used = self.all[index].reserved / 3;
            self.all[index].tokens = used;
            held.settle(used);
        }
        // Leases are of the store's clock.
        for _ in 0..(12 + self.back / 9) {
            self.world.seconds(9);
            for replica in 0..REPLICAS {
                self.world.turn(replica);
            }
        }
        let given_up = self.world.replicas.iter().any(|replica| replica.shared.counters.given_up.get() > 0);
        assert_eq!(self.world.holders(), REPLICAS as u64);
        for (app, application) in self.apps.clone().iter().enumerate() {
            for kind in Kind::ALL.into_iter().filter(|kind| kind.is_leased()) {
                let buckets = self.world.buckets(&application.name, kind);
                assert!(buckets.iter().all(|(_, _, leased)| *leased == 0), "{kind:?}: {buckets:?}");
                for (bucket, used, _) in buckets {
                    let of = |a: &&Admitted| match kind {
                        Kind::TokensPerDay => a.day == Some(bucket),
                        Kind::TokensPerMonth => a.month == Some(bucket),
                        _ => false,
                    };
                    let real: u64 =
                        self.all.iter().filter(|a| a.app == app).filter(of).map(|a| a.tokens).sum();
                    assert!(used >= real, "{kind:?} {bucket}: {used} counted, {real} used");
                    if self.exact && !given_up {
                        assert_eq!(used, real, "{kind:?} {bucket}");
                    }
                }
            }
            let shared = &self.world.replicas[0].shared;
            let waiting = shared.book().waiting;
            assert_eq!(waiting, 0);
        }
        // Nothing is stuck: on another day a request of a whole limit is admitted.
        self.world.seconds(40 * 24 * 3600);
        for _ in 0..3 {
            self.world.seconds(9);
            for replica in 0..REPLICAS {
                self.world.turn(replica);
            }
        }
        self.world.reserve(1, &self.apps[1].clone(), demand(0, 4000)).unwrap().settle(0);
        self.world.reserve(2, &self.apps[2].clone(), demand(0, 20_000)).unwrap().settle(0);
    }
}

impl<D: Database> World<D>
where
    D::Driver: 'static,
{
    /// Bucket, spent and leased of a kind.
    fn buckets(&self, application: &str, kind: Kind) -> Vec<(i64, u64, u64)> {
        let query = "SELECT bucket, used, leased FROM mirai_quota WHERE application = $1 AND kind = $2";
        let params = [Value::Text(application.into()), Value::Text(kind.word().into())];
        let rows = self.db.connect().driver().query(query, &params).unwrap();
        let read = |row: Vec<Value>| {
            let values = &mut row.into_iter();
            (take(values, "bucket").unwrap(), take(values, "used").unwrap(), take(values, "leased").unwrap())
        };
        rows.into_iter().map(read).collect()
    }
}

pub(super) fn agrees_with_the_oracle<D: Database>(cases: u32, make: impl Fn() -> D)
where
    D::Driver: 'static,
{
    let history = (0..BEGINS.len(), proptest::collection::vec(op(), 1..120));
    let result = runner(cases).run(&history, |(begins, ops)| {
        let mut oracle = Oracle::new(make(), BEGINS[begins]);
        for op in &ops {
            oracle.apply(op);
        }
        oracle.end();
        Ok(())
    });
    result.unwrap();
}

#[test]
fn random_histories_agree_with_the_oracle() {
    let cases = std::env::var("QUOTA_CASES").ok().and_then(|cases| cases.parse().ok());
    agrees_with_the_oracle(cases.unwrap_or(if cfg!(coverage) { 16 } else { 40 }), SqliteFile::new);
}
