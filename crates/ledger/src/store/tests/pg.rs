//! A PostgreSQL server of our own, where Debian's is installed.

use std::os::unix::fs::{MetadataExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use super::*;
use crate::error::StoreError;
use crate::store::postgres::Postgres;

/// A server, for one test.
pub(crate) struct Server {
    folder: tempfile::TempDir,
    programs: PathBuf,
    /// PostgreSQL refuses to run as root.
    user: Option<u32>,
    schemas: AtomicU32,
}

/// Where `initdb` is.
fn programs() -> Option<PathBuf> {
    let mut folders: Vec<PathBuf> =
        std::env::var_os("PATH").map(|path| std::env::split_paths(&path).collect()).unwrap_or_default();
    if let Ok(versions) = std::fs::read_dir("/usr/lib/postgresql") {
        folders.extend(versions.flatten().map(|version| version.path().join("bin")));
    }
    folders.into_iter().find(|folder| folder.join("initdb").is_file() && folder.join("pg_ctl").is_file())
}

impl Server {
    /// `None`, with one word said, where PostgreSQL is not installed.
    pub(crate) fn start() -> Option<Self> {
        let Some(programs) = programs() else {
            println!("SKIPPED: no postgresql");
            return None;
        };
        let folder = SqliteFile::new().folder;
        let root = std::fs::metadata(folder.path()).unwrap().uid() == 0;
        let user = root.then_some(65_534);
        if user.is_some() {
            chown(folder.path(), user, user).unwrap();
        }
        let server = Self { folder, programs, user, schemas: AtomicU32::new(0) };
        let data = server.data();
        server.run("initdb", &["-D", &data, "-A", "trust", "-U", "mirai", "-E", "UTF8", "--no-sync"]);
        server.up();
        Some(server)
    }

    fn data(&self) -> String {
        self.folder.path().join("data").display().to_string()
    }

    fn run(&self, program: &str, args: &[&str]) {
        let mut command = Command::new(self.programs.join(program));
        command.args(args).current_dir(self.folder.path()).stdin(Stdio::null());
        // To a file: a server that keeps a pipe open would keep us waiting.
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.folder.path().join("log"));
        let log = log.unwrap();
        command.stdout(log.try_clone().unwrap()).stderr(log);
        if let Some(user) = self.user {
            command.uid(user).gid(user);
        }
        let status = command.status().unwrap();
        let log = std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
        assert!(status.success(), "{program} {args:?}: {log}");
    }

    pub(crate) fn up(&self) {
        let socket = self.folder.path().display();
        let options = format!("-c listen_addresses= -c unix_socket_directories={socket} -c fsync=off");
        self.run("pg_ctl", &["-D", &self.data(), "-w", "-l", "server", "-o", &options, "start"]);
    }

    /// As if it had been killed.
    pub(crate) fn down(&self) {
        self.run("pg_ctl", &["-D", &self.data(), "-w", "-m", "immediate", "stop"]);
    }

    fn url(&self, options: &str) -> String {
        format!("host={} user=mirai dbname=postgres {options}", Path::display(self.folder.path()))
    }

    /// An empty place of its own.
    pub(crate) fn database(&self) -> PgSchema {
        let name = format!("s{}", self.schemas.fetch_add(1, Ordering::Relaxed));
        let mut admin = Postgres::new(&self.url("")).unwrap();
        admin.execute(&format!("CREATE SCHEMA {name}"), &[]).unwrap();
        PgSchema(self.url(&format!("options='-c search_path={name}'")))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let pid = self.folder.path().join("data/postmaster.pid");
        if pid.exists() {
            self.down();
        }
    }
}

/// A schema of a server.
pub(crate) struct PgSchema(pub(crate) String);

impl Database for PgSchema {
    type Driver = Postgres;
    fn connect(&self) -> SqlStore<Postgres> {
        SqlStore::connect(&self.0, Some(key())).unwrap()
    }
}

#[test]
fn the_suite_holds_on_postgresql() {
    let Some(server) = Server::start() else { return };
    rules::all(|| server.database());
    history::agrees_with_the_model(if cfg!(coverage) { 2 } else { 6 }, || server.database());
    schema::two_versions(&server.database());
    two_start_at_once(&server);
    it_comes_back(&server);
}

fn two_start_at_once(server: &Server) {
    let schema = server.database();
    std::thread::scope(|scope| {
        let starts: Vec<_> = (0..6)
            .map(|_| {
                scope.spawn(|| {
                    let mut store = schema.connect();
                    loop {
                        match store.register("same", LEASE, false) {
                            Err(error) => assert!(error.is_unavailable(), "{error}"),
                            Ok(epoch) => return epoch.epoch,
                        }
                    }
                })
            })
            .collect();
        let mut epochs: Vec<u64> = starts.into_iter().map(|start| start.join().unwrap()).collect();
        epochs.sort_unstable();
        assert_eq!(epochs, [1, 2, 3, 4, 5, 6]);
    });
    sound(&mut schema.connect());
}

fn it_comes_back(server: &Server) {
    let schema = server.database();
    let mut store = schema.connect();
    let me = store.register("w", LEASE, false).unwrap();
    store.commit(&me, LEASE, &[new(request(1))]).unwrap();
    store.sql.begin(true).unwrap();
    server.down();
    let change = "UPDATE mirai_request SET status = 1";
    assert!(store.sql.execute(change, &[]).unwrap_err().is_unavailable());
    server.up();
    // What was begun is not gone on with on another connection.
    assert!(store.sql.execute(change, &[]).unwrap_err().is_unavailable());
    store.sql.rollback();
    server.down();
    assert!(store.commit(&me, LEASE, &[new(request(2))]).unwrap_err().is_unavailable());
    server.up();
    store.commit(&me, LEASE, &[new(request(2)), old(closed(&request(1), 3))]).unwrap();
    assert_eq!(sound(&mut store).rows, 2);
    let wrong = Postgres::new("postgres://u:secret@[/x").unwrap_err();
    assert!(matches!(&wrong, StoreError::Broken(text) if !text.contains("secret")));
    assert!(matches!(store.sql.query("SELECT nonsense", &[]), Err(StoreError::Broken(_))));
    assert_eq!(format!("{:?}", store.sql), "Postgres { connected: true, .. }");
}
