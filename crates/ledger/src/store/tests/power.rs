//! Power loss, failed syncs and full disks under SQLite, at every write and sync in turn.
//!
//! A file system in memory stands below SQLite. It knows what was synced; when the power goes, of what was not
//! synced any part may be there, in any order, and sectors may be torn. Only this module speaks to SQLite's C
//! interface.

#![allow(unsafe_code)]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::Once;

use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rusqlite::{Connection, OpenFlags, ffi};

use super::*;
use crate::error::StoreError;

/// A change that is not synced.
#[derive(Clone)]
enum Change {
    Write(usize, Vec<u8>),
    Truncate(usize),
}

impl Change {
    fn apply(&self, to: &mut Vec<u8>) {
        match self {
            Self::Write(at, bytes) => {
                if to.len() < at + bytes.len() {
                    to.resize(at + bytes.len(), 0);
                }
                to[*at..at + bytes.len()].copy_from_slice(bytes);
            }
            Self::Truncate(length) => to.truncate(*length),
        }
    }
}

#[derive(Clone, Default)]
struct FileState {
    /// What the disk has for certain.
    durable: Vec<u8>,
    /// What the process sees.
    current: Vec<u8>,
    pending: Vec<Change>,
    /// Its name is on the disk.
    named: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// Nothing works from that call on.
    Power,
    /// That call fails with an I/O error; what was not synced is as after a power loss.
    Io,
    /// That write finds no space; all is well before and after.
    Full,
}

#[derive(Clone, Default)]
struct Disk {
    files: BTreeMap<String, FileState>,
    /// Writes, truncations and syncs so far.
    calls: u32,
    fault: Option<(u32, Fault)>,
    off: bool,
}

impl Disk {
    /// Counts a call, and tells with what it fails.
    fn call(&mut self, writes: bool) -> c_int {
        let at = self.calls;
        self.calls += 1;
        match self.fault {
            _ if self.off => ffi::SQLITE_IOERR,
            Some((when, Fault::Power)) if at >= when => {
                self.off = true;
                ffi::SQLITE_IOERR
            }
            Some((when, Fault::Io)) if at == when => {
                if writes {
                    ffi::SQLITE_IOERR_WRITE
                } else {
                    ffi::SQLITE_IOERR_FSYNC
                }
            }
            Some((when, Fault::Full)) if at == when && writes => ffi::SQLITE_FULL,
            _ => ffi::SQLITE_OK,
        }
    }

    /// The disk as the next process finds it.
    fn lose_power(&mut self, rng: &mut StdRng) {
        self.files.retain(|_, file| file.named || rng.random());
        for file in self.files.values_mut() {
            let mut left: Vec<Change> = std::mem::take(&mut file.pending);
            if rng.random() {
                left.shuffle(rng);
            }
            let share = [0.0, 0.5, 1.0][rng.random_range(0..3)];
            for change in left {
                if !rng.random_bool(share) {
                    continue;
                }
                match change {
                    Change::Write(at, bytes) => {
                        // Sector by sector; the last may be torn.
                        for (i, sector) in bytes.chunks(512).enumerate() {
                            let torn = if rng.random_bool(0.1) { sector.len() / 2 } else { sector.len() };
                            if rng.random_bool(0.8) {
                                let part = sector[..torn].to_vec();
                                Change::Write(at + i * 512, part).apply(&mut file.durable);
                            }
                        }
                    }
                    other => other.apply(&mut file.durable),
                }
            }
            file.current.clone_from(&file.durable);
            file.named = true;
        }
        (self.calls, self.fault, self.off) = (0, None, false);
    }
}

thread_local! {
    static DISK: RefCell<Disk> = RefCell::default();
}

fn disk<T>(run: impl FnOnce(&mut Disk) -> T) -> T {
    DISK.with(|disk| run(&mut disk.borrow_mut()))
}

/// SQLite's file object, followed by ours.
#[repr(C)]
struct OpenFile {
    base: ffi::sqlite3_file,
    name: *mut c_char,
}

/// The state of the file behind SQLite's pointer.
///
/// # Safety
/// `file` must be one that [`open`] filled in and `close` has not seen.
unsafe fn state<T>(file: *mut ffi::sqlite3_file, run: impl FnOnce(&mut Disk, &str) -> T) -> T {
    // SAFETY: the caller's; `name` came from `CString::into_raw`.
    let name = unsafe { CStr::from_ptr((*file.cast::<OpenFile>()).name) };
    disk(|disk| run(disk, name.to_str().unwrap()))
}

unsafe extern "C" fn close(file: *mut ffi::sqlite3_file) -> c_int {
    // SAFETY: SQLite closes a file once; the name was made by `into_raw`.
    drop(unsafe { CString::from_raw((*file.cast::<OpenFile>()).name) });
    ffi::SQLITE_OK
}

unsafe extern "C" fn read(file: *mut ffi::sqlite3_file, to: *mut c_void, n: c_int, at: i64) -> c_int {
    // SAFETY: SQLite passes a buffer of `n` bytes.
    let to = unsafe { std::slice::from_raw_parts_mut(to.cast::<u8>(), n as usize) };
    // SAFETY: an open file.
    unsafe {
        state(file, |disk, name| {
            if disk.off {
                return ffi::SQLITE_IOERR_READ;
            }
            let bytes = &disk.files[name].current;
            let from = bytes.get(at as usize..).unwrap_or_default();
            let have = from.len().min(to.len());
            to[..have].copy_from_slice(&from[..have]);
            to[have..].fill(0);
            if have < to.len() { ffi::SQLITE_IOERR_SHORT_READ } else { ffi::SQLITE_OK }
        })
    }
}

fn change(disk: &mut Disk, name: &str, change: Change) -> c_int {
    let code = disk.call(true);
    if code == ffi::SQLITE_OK {
        let file = disk.files.get_mut(name).unwrap();
        change.apply(&mut file.current);
        file.pending.push(change);
    }
    code
}

unsafe extern "C" fn write(file: *mut ffi::sqlite3_file, from: *const c_void, n: c_int, at: i64) -> c_int {
    // SAFETY: SQLite passes a buffer of `n` bytes.
    let bytes = unsafe { std::slice::from_raw_parts(from.cast::<u8>(), n as usize) }.to_vec();
    // SAFETY: an open file.
    unsafe { state(file, |disk, name| change(disk, name, Change::Write(at as usize, bytes))) }
}

unsafe extern "C" fn truncate(file: *mut ffi::sqlite3_file, length: i64) -> c_int {
    // SAFETY: an open file.
    unsafe { state(file, |disk, name| change(disk, name, Change::Truncate(length as usize))) }
}

unsafe extern "C" fn sync(file: *mut ffi::sqlite3_file, _flags: c_int) -> c_int {
    // SAFETY: an open file.
    unsafe {
        state(file, |disk, name| {
            let code = disk.call(false);
            if code == ffi::SQLITE_OK {
                let file = disk.files.get_mut(name).unwrap();
                file.pending.clear();
                file.durable.clone_from(&file.current);
                file.named = true;
            }
            code
        })
    }
}

unsafe extern "C" fn size(file: *mut ffi::sqlite3_file, to: *mut i64) -> c_int {
    // SAFETY: an open file, and a place for the answer.
    unsafe { *to = state(file, |disk, name| disk.files[name].current.len() as i64) };
    ffi::SQLITE_OK
}

unsafe extern "C" fn lock(_: *mut ffi::sqlite3_file, _: c_int) -> c_int {
    ffi::SQLITE_OK
}

unsafe extern "C" fn reserved(_: *mut ffi::sqlite3_file, to: *mut c_int) -> c_int {
    // SAFETY: a place for the answer.
    unsafe { *to = 0 };
    ffi::SQLITE_OK
}

unsafe extern "C" fn control(_: *mut ffi::sqlite3_file, _: c_int, _: *mut c_void) -> c_int {
    ffi::SQLITE_NOTFOUND
}

unsafe extern "C" fn sector(_: *mut ffi::sqlite3_file) -> c_int {
    512
}

unsafe extern "C" fn characteristics(_: *mut ffi::sqlite3_file) -> c_int {
    0
}

static METHODS: ffi::sqlite3_io_methods = ffi::sqlite3_io_methods {
    iVersion: 1,
    xClose: Some(close),
    xRead: Some(read),
    xWrite: Some(write),
    xTruncate: Some(truncate),
    xSync: Some(sync),
    xFileSize: Some(size),
    xLock: Some(lock),
    xUnlock: Some(lock),
    xCheckReservedLock: Some(reserved),
    xFileControl: Some(control),
    xSectorSize: Some(sector),
    xDeviceCharacteristics: Some(characteristics),
    xShmMap: None,
    xShmLock: None,
    xShmBarrier: None,
    xShmUnmap: None,
    xFetch: None,
    xUnfetch: None,
};

unsafe extern "C" fn open(
    _: *mut ffi::sqlite3_vfs,
    name: *const c_char,
    file: *mut ffi::sqlite3_file,
    flags: c_int,
    out: *mut c_int,
) -> c_int {
    // SAFETY: SQLite gives a name, or none for a file that it would delete; there are none of those here.
    let name = unsafe { CStr::from_ptr(name) }.to_owned();
    let there = disk(|disk| {
        let new = !disk.files.contains_key(name.to_str().unwrap());
        if new && (disk.off || flags & ffi::SQLITE_OPEN_CREATE == 0) {
            return false;
        }
        disk.files.entry(name.to_str().unwrap().to_owned()).or_default();
        true
    });
    // SAFETY: SQLite gives room for `szOsFile` bytes, and for the flags unless it wants none.
    unsafe {
        let file = file.cast::<OpenFile>();
        (*file).base.pMethods = std::ptr::null();
        if !there {
            return ffi::SQLITE_CANTOPEN;
        }
        (*file).name = name.into_raw();
        (*file).base.pMethods = &raw const METHODS;
        if !out.is_null() {
            *out = flags;
        }
    }
    ffi::SQLITE_OK
}

unsafe extern "C" fn delete(_: *mut ffi::sqlite3_vfs, name: *const c_char, _sync: c_int) -> c_int {
    // SAFETY: a name.
    let name = unsafe { CStr::from_ptr(name) }.to_str().unwrap();
    disk(|disk| {
        if disk.off {
            return ffi::SQLITE_IOERR_DELETE;
        }
        disk.files.remove(name);
        ffi::SQLITE_OK
    })
}

unsafe extern "C" fn access(
    _: *mut ffi::sqlite3_vfs,
    name: *const c_char,
    _: c_int,
    to: *mut c_int,
) -> c_int {
    // SAFETY: a name, and a place for the answer.
    unsafe {
        let name = CStr::from_ptr(name).to_str().unwrap();
        *to = c_int::from(disk(|disk| disk.files.contains_key(name)));
    }
    ffi::SQLITE_OK
}

unsafe extern "C" fn full_path(
    _: *mut ffi::sqlite3_vfs,
    name: *const c_char,
    room: c_int,
    to: *mut c_char,
) -> c_int {
    // SAFETY: a name, and `room` bytes for the answer.
    unsafe {
        let bytes = CStr::from_ptr(name).to_bytes_with_nul();
        assert!(bytes.len() <= room as usize);
        std::ptr::copy_nonoverlapping(bytes.as_ptr().cast(), to, bytes.len());
    }
    ffi::SQLITE_OK
}

static REGISTERED: Once = Once::new();

fn connect() -> Result<SqlStore<Sqlite>, StoreError> {
    REGISTERED.call_once(|| {
        // SAFETY: the default VFS exists for ever; ours is leaked, so it does too. Clock, sleep and random
        // numbers stay the default's, which take nothing from the structure.
        unsafe {
            let mut vfs = *ffi::sqlite3_vfs_find(std::ptr::null());
            vfs.iVersion = 1;
            vfs.szOsFile = size_of::<OpenFile>() as c_int;
            vfs.pNext = std::ptr::null_mut();
            vfs.zName = c"power".as_ptr();
            vfs.xOpen = Some(open);
            vfs.xDelete = Some(delete);
            vfs.xAccess = Some(access);
            vfs.xFullPathname = Some(full_path);
            assert_eq!(ffi::sqlite3_vfs_register(Box::leak(Box::new(vfs)), 0), ffi::SQLITE_OK);
        }
    });
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE;
    let fault = |e| crate::store::sqlite::meaning(&e);
    let connection = Connection::open_with_flags_and_vfs("ledger.db", flags, c"power").map_err(fault)?;
    // Without shared memory, which this file system lacks; and checkpoints often enough to be hit.
    connection
        .execute_batch("PRAGMA locking_mode = EXCLUSIVE; PRAGMA wal_autocheckpoint = 10;")
        .map_err(fault)?;
    SqlStore::new(Sqlite::new(connection, 64, None)?, Some(key()))
}

/// What the store has promised, and what was asked of it at most.
#[derive(Default)]
struct Promised {
    /// By row: durable tokens, whether it is closed.
    rows: BTreeMap<String, (u64, bool)>,
    asked: BTreeMap<String, u64>,
}

/// A process's life, as the ledger lives it: unavailable is tried again, broken is the end.
fn life(first: u64, promised: &mut Promised) -> Result<(), StoreError> {
    let mut store = connect()?;
    let end = (|| {
        let mut retry = |what: &mut dyn FnMut(&mut SqlStore<Sqlite>) -> Result<(), StoreError>| {
            for _ in 0..3 {
                match what(&mut store) {
                    Err(error) if error.is_unavailable() => {}
                    other => return other,
                }
            }
            unreachable!("one call is told to fail")
        };
        let mut owner = None;
        retry(&mut |store| store.register("w", LEASE, true).map(|epoch| owner = Some(epoch)))?;
        let owner = owner.unwrap();
        retry(&mut |store| {
            while store.recover(&owner, 2)?.more {}
            Ok(())
        })?;
        for step in 0..8 {
            let n = first + step;
            let batch = [
                new(request(n)),
                old(tokens(&request(n.saturating_sub(1).max(first)), 8)),
                old(closed(&request(n.saturating_sub(2).max(first)), 10)),
            ];
            let batch = &batch[..1 + step.min(2) as usize];
            for entry in batch {
                let asked = promised.asked.entry(entry.row.id.clone()).or_default();
                *asked = (*asked).max(entry.row.completion_tokens);
            }
            retry(&mut |store| store.commit(&owner, LEASE, batch).map(|_| ()))?;
            for Entry { row, .. } in batch {
                let told = promised.rows.entry(row.id.clone()).or_default();
                *told = (row.completion_tokens, row.state == State::Closed);
            }
        }
        Ok(())
    })();
    // The process is gone: what closing would still write is not written.
    disk(|disk| disk.off = true);
    end
}

fn check(promised: &Promised, what: &str) {
    let mut store = connect().unwrap();
    let me = store.register("w", LEASE, true).unwrap();
    while store.recover(&me, 3).unwrap().more {}
    sound(&mut store);
    let rows = store.rows("", 1000).unwrap();
    for (id, &(tokens, ended)) in &promised.rows {
        let row = rows.iter().find(|row| row.id == *id);
        let row = row.unwrap_or_else(|| panic!("{what}: {id} is lost"));
        assert!(row.completion_tokens >= tokens, "{what}: {row:?}");
        if ended {
            assert_eq!((row.completion_tokens, &row.finish), (tokens, &Finish::Stop), "{what}");
        }
    }
    for row in &rows {
        assert_eq!(row.state, State::Closed);
        assert!(promised.asked.get(&row.id).is_some_and(|asked| row.completion_tokens <= *asked), "{what}");
    }
    let before = store.chains().unwrap();
    assert_eq!(store.recover(&me, 3).unwrap(), crate::store::Recovered::default());
    assert_eq!(store.chains().unwrap(), before);
}

#[test]
fn a_fault_at_every_write_and_sync_breaks_no_promise() {
    let seed: u64 =
        std::env::var("LEDGER_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or_else(rand::random);
    println!("LEDGER_SEED={seed}");
    // How many calls two lives take.
    let mut promised = Promised::default();
    life(0, &mut promised).unwrap();
    let calls = disk(|disk| disk.calls);
    let mut rng = StdRng::seed_from_u64(seed);
    disk(|disk| disk.lose_power(&mut rng));
    check(&promised, "no fault");
    assert!(calls > 60, "{calls}");
    let mut broken = 0;
    // Every fifth call, from a random one on; `LEDGER_FULL=1` takes each.
    let step = if std::env::var_os("LEDGER_FULL").is_some() { 1 } else { 5 };
    for fault in [Fault::Power, Fault::Io, Fault::Full] {
        for at in (rng.random_range(0..step)..calls).step_by(step as usize) {
            // The first life is on an empty disk, the second on what it left.
            for second in [false, true] {
                disk(|disk| *disk = Disk::default());
                let mut promised = Promised::default();
                if second {
                    life(0, &mut promised).unwrap();
                    disk(|disk| disk.lose_power(&mut rng));
                }
                disk(|disk| disk.fault = Some((at, fault)));
                broken += u32::from(life(100, &mut promised).is_err());
                disk(|disk| disk.lose_power(&mut rng));
                check(&promised, &format!("{fault:?} at call {at} of {calls}, second life: {second}"));
            }
        }
    }
    println!("{calls} calls, {broken} lives ended by a fault");
    assert!(broken > calls / step);
}
