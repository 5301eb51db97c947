use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use candle_core::Device;
use tempfile::TempDir;

use super::*;
use crate::ErrorKind;
use crate::adapter::Generation;
use crate::adapter::files::{CONFIG, WEIGHTS};
use crate::adapter::testing::{Bucket, Files, Net, Tensor, adapter, adapter_of_rank, classifier, fixtures, tiny};
use crate::base::testing::{decoder, options};
use crate::base::{Base, Kernels};
use crate::lora::HostUploads;

pub(super) struct World {
    pub root: TempDir,
    pub memory: usize,
    pub pool: Option<Arc<Pool>>,
    pub metrics: Arc<Metrics>,
    /// Sources, of which those that list come first.
    pub buckets: Vec<Arc<Bucket>>,
    pub web: Vec<Arc<Bucket>>,
    pub source_refresh: Duration,
    pub source_cache: u64,
}

impl World {
    pub fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("adapters")).unwrap();
        World {
            root,
            memory: 1 << 20,
            pool: None,
            metrics: Arc::new(Metrics::new()),
            buckets: vec![],
            web: vec![],
            source_refresh: Duration::from_millis(10),
            source_cache: 1 << 20,
        }
    }

    /// Puts an adapter into the read-only folder.
    pub fn folder(&self, name: &str, files: &Files) -> PathBuf {
        let path = self.root.path().join("adapters").join(name);
        files.write(&path);
        path
    }

    pub fn open(&self) -> Arc<Registry> {
        self.open_with("tiny").unwrap()
    }

    pub fn open_with(&self, base: &str) -> Result<Arc<Registry>> {
        let listed = self.buckets.iter().map(|bucket| (bucket, true));
        let sources = listed.chain(self.web.iter().map(|bucket| (bucket, false))).enumerate();
        let source = |(i, (bucket, lists)): (usize, (&Arc<Bucket>, bool))| {
            let (store, url) = (Arc::new(Net(bucket.clone())), format!("memory://source-{i}"));
            Remote::over(store, &url, "prefix".into(), lists).with_patience(Duration::from_secs(1))
        };
        let options = RegistryOptions {
            base: base.into(),
            decoder: Arc::new(decoder(&tiny(), options(Kernels::for_device(&Device::Cpu)), 1)),
            language: Base::open(&fixtures().join("tiny/llama/base").to_string_lossy())?.language(),
            directories: vec![self.root.path().join("adapters")],
            store: self.root.path().join("store"),
            memory: self.memory,
            pool: self.pool.clone(),
            max_upload: 1 << 20,
            uploaded_templates: false,
            sources: sources.map(source).collect(),
            source_refresh: self.source_refresh,
            source_cache: self.source_cache,
        };
        Registry::open(options, self.metrics.clone())
    }

    fn object(&self, info: &AdapterInfo) -> PathBuf {
        self.root.path().join("store/objects").join(&info.generation)
    }

    pub fn gauge(&self, registry: &Registry, tier: &str) -> (i64, i64) {
        registry.update_metrics();
        let value = |gauges: &prometheus::IntGaugeVec| gauges.with_label_values(&[tier]).get();
        (value(&self.metrics.adapters), value(&self.metrics.adapter_bytes))
    }
}

pub(super) fn upload(registry: &Registry, files: &Files) -> Upload {
    let upload = registry.upload().unwrap();
    files.write(upload.path());
    upload
}

async fn publish(registry: &Registry, name: &str, seed: usize) -> (AdapterInfo, Published) {
    registry.publish(name, upload(registry, &adapter(seed)), Condition::Always).await.unwrap()
}

fn generation(info: &AdapterInfo) -> Generation {
    Generation::new(info.generation.as_str())
}

fn names(registry: &Registry) -> Vec<String> {
    registry.list().into_iter().map(|info| info.name).collect()
}

#[tokio::test]
async fn folders_are_served_and_broken_ones_left_out() {
    let world = World::new();
    world.folder("b", &adapter(1));
    world.folder("a", &classifier(2));
    let broken = world.folder("broken", &adapter(3));
    std::fs::write(broken.join(WEIGHTS), "x").unwrap();
    world.folder("-bad-name", &adapter(4));
    world.folder("tiny", &adapter(4));
    std::fs::create_dir(world.root.path().join("adapters/empty")).unwrap();
    let registry = world.open();
    assert_eq!(names(&registry), ["a", "b"]);
    let info = registry.get("a").unwrap();
    assert_eq!((info.source, info.tier, info.rank, info.in_flight), (Source::Directory, Tier::Disk, 2, 0));
    assert_eq!((info.lora_alpha, info.labels.unwrap().len()), (4.0, 3));
    assert_eq!(info.target_modules, ["q_proj", "v_proj"]);
    for name in ["broken", "nobody"] {
        assert_eq!(registry.get(name).unwrap_err().kind, ErrorKind::NotFound);
        assert_eq!(registry.acquire(name).await.unwrap_err().kind, ErrorKind::NotFound);
    }
    let error = registry.remove("a", Condition::Always).await.unwrap_err();
    assert!(error.kind == ErrorKind::Conflict && error.message.contains("read-only"), "{error}");
}

#[tokio::test]
async fn a_crowd_for_more_adapters_than_fit_takes_turns() {
    let mut world = World::new();
    (0..6).for_each(|i| drop(world.folder(&format!("a{i}"), &adapter(i))));
    let registry = world.open();
    let bytes = registry.get("a0").unwrap().bytes as usize;
    world.memory = 2 * bytes + bytes / 2;
    drop(registry);
    let registry = world.open();
    let most = AtomicUsize::new(0);
    let ask = async |i: usize| {
        let held = registry.acquire(&format!("a{i}")).await.unwrap();
        most.fetch_max(registry.inner.cache.totals().1, Ordering::SeqCst);
        tokio::time::sleep(Duration::from_millis(20)).await;
        held.generation.to_string()
    };
    let asked = futures::future::join_all((0..24).map(|i| ask(i % 6)));
    let generations: HashSet<String> = asked.await.into_iter().collect();
    assert_eq!(generations.len(), 6);
    let most = most.load(Ordering::SeqCst);
    assert!(0 < most && most <= world.memory, "{most} bytes of adapters, room for {}", world.memory);
}

/// Pages for so many of the adapters that `adapter` makes. Returns the bytes of one. The tier counts on more room.
fn pages_for(world: &mut World, adapters: usize) -> usize {
    const PAGE: usize = 256;
    let one = world.folder("one", &adapter(100));
    let (base, loaded) = (decoder(&tiny(), options(Kernels::for_device(&Device::Cpu)), 1), tiny());
    let loaded = peft::load(&one, &loaded, "tiny").unwrap();
    let packed = PackedAdapter::for_pages(loaded.adapter, &base, &HostUploads::pool(PAGE, 1)).unwrap();
    assert!(!packed.is_placed() && packed.bytes.is_multiple_of(PAGE) && packed.bytes > PAGE, "{}", packed.bytes);
    std::fs::remove_dir_all(one).unwrap();
    world.pool = Some(HostUploads::pool(PAGE, adapters * packed.bytes / PAGE));
    packed.bytes
}

#[tokio::test]
async fn adapters_have_pages_while_they_are_in_memory() {
    let mut world = World::new();
    (0..6).for_each(|i| drop(world.folder(&format!("a{i}"), &adapter(i))));
    let bytes = pages_for(&mut world, 2);
    let registry = world.open();
    let ask = async |i: usize| {
        let held = registry.acquire(&format!("a{i}")).await.unwrap();
        assert!(held.is_placed());
        assert_eq!(held.bytes, bytes);
        tokio::time::sleep(Duration::from_millis(5)).await;
        held.generation.to_string()
    };
    let asked = futures::future::join_all((0..24).map(|i| ask(i % 6)));
    let generations: HashSet<String> = asked.await.into_iter().collect();
    assert_eq!(generations.len(), 6);
    assert_eq!(world.gauge(&registry, "device"), (2, 2 * bytes as i64));
    // What is uploaded while all pages are in use waits on disk.
    let held = [registry.acquire("a0").await.unwrap(), registry.acquire("a1").await.unwrap()];
    let (info, _) = publish(&registry, "mine", 7).await;
    assert_eq!(info.tier, Tier::Disk);
    drop(held);
    assert!(registry.acquire("mine").await.unwrap().is_placed());
    let (info, _) = publish(&registry, "mine", 8).await;
    assert_eq!(info.tier, Tier::Device);
}

#[tokio::test]
async fn an_adapter_of_more_pages_than_there_are_is_refused() {
    let mut world = World::new();
    let path = world.folder("a", &adapter(1));
    pages_for(&mut world, 1);
    world.pool = Some(HostUploads::pool(256, 1));
    let registry = world.open();
    let error = registry.acquire("a").await.unwrap_err();
    assert!(error.kind == ErrorKind::TooLarge && error.message.contains("pages of 256 bytes"), "{error}");
    let error = registry.publish("mine", upload(&registry, &adapter(2)), Condition::Always).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::TooLarge);
    assert_eq!(registry.get("mine").unwrap_err().kind, ErrorKind::NotFound);
    drop(path);
}

#[tokio::test]
async fn published_adapters_are_hot_pinned_and_survive_a_restart() {
    let world = World::new();
    let registry = world.open();
    let (info, published) = publish(&registry, "mine", 1).await;
    assert_eq!(
        (published, info.source, info.tier, info.in_flight),
        (Published::Created, Source::Store, Tier::Device, 0)
    );
    let held = registry.acquire("mine").await.unwrap();
    assert_eq!(held.generation.as_str(), info.generation);
    assert_eq!(registry.get("mine").unwrap().in_flight, 1);
    assert_eq!(publish(&registry, "mine", 1).await.1, Published::Unchanged);
    let (second, published) = publish(&registry, "mine", 2).await;
    assert_eq!(published, Published::Replaced);
    assert_ne!(second.generation, info.generation);
    // Who held the old one keeps it; it is in nobody's way.
    assert_eq!(held.generation.as_str(), info.generation);
    let new = registry.acquire("mine").await.unwrap();
    assert_eq!(new.generation.as_str(), second.generation);
    assert_eq!(world.gauge(&registry, "device"), (2, (held.bytes + new.bytes) as i64));
    drop(held);
    assert_eq!(world.gauge(&registry, "device"), (1, new.bytes as i64));
    assert_eq!(world.gauge(&registry, "disk"), (1, second.bytes as i64));
    drop((registry, new));
    let registry = world.open();
    let again = registry.get("mine").unwrap();
    assert_eq!((&again.generation, again.created, again.tier), (&second.generation, second.created, Tier::Disk));
    assert_eq!(registry.acquire("mine").await.unwrap().generation.as_str(), second.generation);
    assert_eq!(registry.get("mine").unwrap().tier, Tier::Device);
    let removed = registry.remove("mine", Condition::Always).await.unwrap();
    assert_eq!(removed.generation, second.generation);
    assert_eq!(
        (names(&registry).len(), world.gauge(&registry, "device"), world.gauge(&registry, "disk")),
        (0, (0, 0), (0, 0))
    );
    assert_eq!(std::fs::read_dir(world.root.path().join("store/objects")).unwrap().count(), 0);
    assert_eq!(registry.remove("mine", Condition::Always).await.unwrap_err().kind, ErrorKind::NotFound);
}

#[tokio::test]
async fn a_pinned_name_stays_in_memory_whatever_else_is_asked_for() {
    let mut world = World::new();
    // Of a rank at which numbers are most of a file, and of numbers that take f32 in memory, so that all are of one size.
    (0..4).for_each(|i| drop(world.folder(&format!("a{i}"), &adapter_of_rank(i + 3, 64))));
    let (bytes, files) = {
        let registry = world.open();
        (registry.loaded("a0").await.unwrap().bytes, registry.get("a0").unwrap().bytes as usize)
    };
    // One has room beside a pinned one while it is read, and two cannot be pinned.
    world.memory = bytes + files.max(bytes);
    assert!(world.memory < 4 * bytes, "{files} {bytes}");
    let registry = world.open();
    let tiers = || registry.list().iter().map(|info| info.tier == Tier::Device).collect::<Vec<_>>();
    let info = registry.pin("a0").await.unwrap();
    assert_eq!(
        (info.pinned, info.tier, info.memory_bytes, info.requests, info.last_used, info.in_flight),
        (true, Tier::Device, Some(bytes), 0, None, 0)
    );
    for name in ["a1", "a2", "a3"] {
        drop(registry.acquire(name).await.unwrap());
    }
    assert_eq!(tiers(), [true, false, false, true]);
    // Half of the memory is for others.
    let error = registry.pin("a1").await.unwrap_err();
    assert!(error.kind == ErrorKind::Conflict && error.message.contains("may be pinned"), "{error}");
    assert_eq!(registry.unload("a0").unwrap_err().kind, ErrorKind::Conflict);
    // The pin is the name's: it goes over to what is uploaded in the place of the folder's adapter, and back.
    let (uploaded, _) = publish(&registry, "a0", 7).await;
    assert!(uploaded.pinned && uploaded.tier == Tier::Device, "{uploaded:?}");
    let large = upload(&registry, &adapter_of_rank(9, 192));
    let error = registry.publish("a0", large, Condition::Always).await.unwrap_err();
    assert!(error.kind == ErrorKind::Conflict && error.message.contains("is pinned"), "{error}");
    assert_eq!(registry.get("a0").unwrap().generation, uploaded.generation);
    assert_eq!(std::fs::read_dir(world.root.path().join("store/objects")).unwrap().count(), 1);
    for name in ["a1", "a2"] {
        drop(registry.acquire(name).await.unwrap());
    }
    assert_eq!(tiers(), [true, false, true, false]);
    registry.remove("a0", Condition::Always).await.unwrap();
    drop(registry.acquire("a0").await.unwrap());
    for name in ["a1", "a2"] {
        drop(registry.acquire(name).await.unwrap());
    }
    assert_eq!(tiers(), [true, false, true, false]);
    assert!(!registry.unpin("a0").await.unwrap().pinned);
    for name in ["a1", "a2"] {
        drop(registry.acquire(name).await.unwrap());
    }
    assert_eq!(tiers(), [false, true, true, false]);
    for name in ["nobody", "a0/.."] {
        assert_eq!(registry.pin(name).await.unwrap_err().kind, ErrorKind::NotFound);
        assert_eq!(registry.unpin(name).await.unwrap_err().kind, ErrorKind::NotFound);
        assert_eq!(registry.unload(name).unwrap_err().kind, ErrorKind::NotFound);
    }
}

#[tokio::test]
async fn uses_are_counted_by_name_and_unloading_frees_the_memory() {
    let world = World::new();
    let registry = world.open();
    publish(&registry, "a", 1).await;
    publish(&registry, "b", 1).await;
    let before = now();
    let held = registry.acquire("a").await.unwrap();
    drop(registry.acquire("a").await.unwrap());
    registry.acquire("nobody").await.unwrap_err();
    let (a, b) = (registry.get("a").unwrap(), registry.get("b").unwrap());
    assert_eq!((a.requests, b.requests, b.last_used), (2, 0, None));
    assert!(a.last_used.is_some_and(|last| before <= last && last <= now()), "{a:?}");
    // A replacement is the same name.
    assert_eq!(publish(&registry, "a", 2).await.0.requests, 2);
    registry.unload("a").unwrap();
    assert_eq!(registry.get("a").unwrap().tier, Tier::Disk);
    // What is held is in memory until it is released.
    let info = registry.unload("b").unwrap();
    assert_eq!((info.tier, info.in_flight), (Tier::Device, 1));
    drop(held);
    assert_eq!(registry.get("b").unwrap().memory_bytes, None);
    assert_eq!(world.gauge(&registry, "device"), (0, 0));
    drop(registry.acquire("b").await.unwrap());
    assert_eq!(registry.get("b").unwrap().tier, Tier::Device);
}

#[tokio::test]
async fn conditions_are_checked_at_the_swap() {
    let world = World::new();
    let registry = world.open();
    let publish_if = async |name: &str, seed: usize, when: Condition| {
        registry.publish(name, upload(&registry, &adapter(seed)), when).await
    };
    let nothing = Condition::Is(Generation::new("0".repeat(64)));
    assert_eq!(publish_if("a", 1, nothing.clone()).await.unwrap_err().kind, ErrorKind::Conflict);
    let (one, _) = publish_if("a", 1, Condition::Absent).await.unwrap();
    assert_eq!(publish_if("a", 2, Condition::Absent).await.unwrap_err().kind, ErrorKind::Conflict);
    assert_eq!(publish_if("a", 2, nothing.clone()).await.unwrap_err().kind, ErrorKind::Conflict);
    assert_eq!(registry.get("a").unwrap().generation, one.generation);
    let (two, _) = publish_if("a", 2, Condition::Is(generation(&one))).await.unwrap();
    assert_eq!(registry.remove("a", Condition::Is(generation(&one))).await.unwrap_err().kind, ErrorKind::Conflict);
    registry.remove("a", Condition::Is(generation(&two))).await.unwrap();
    // What was refused has left nothing behind.
    assert_eq!(std::fs::read_dir(world.root.path().join("store/objects")).unwrap().count(), 0);
    assert_eq!(std::fs::read_dir(world.root.path().join("store/incoming")).unwrap().count(), 0);
    assert_eq!(world.gauge(&registry, "device"), (0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_swaps_that_expect_the_same_one_wins() {
    let world = World::new();
    let registry = world.open();
    let (mut current, _) = publish(&registry, "a", 0).await;
    for round in 0..5 {
        let tries: Vec<_> = (0..4)
            .map(|i| {
                let registry = registry.clone();
                let when = Condition::Is(generation(&current));
                tokio::spawn(async move {
                    let upload = upload(&registry, &adapter(1 + round * 4 + i));
                    registry.publish("a", upload, when).await
                })
            })
            .collect();
        let mut won = vec![];
        for attempt in tries {
            match attempt.await.unwrap() {
                Ok((info, _)) => won.push(info),
                Err(e) => assert_eq!(e.kind, ErrorKind::Conflict, "{e}"),
            }
        }
        assert_eq!(won.len(), 1);
        assert_eq!(registry.get("a").unwrap().generation, won[0].generation);
        current = won.remove(0);
    }
    assert_eq!(std::fs::read_dir(world.root.path().join("store/objects")).unwrap().count(), 1);
}

#[tokio::test]
async fn an_upload_hides_a_folder_until_it_is_removed() {
    let world = World::new();
    world.folder("a", &adapter(1));
    let registry = world.open();
    let original = registry.get("a").unwrap();
    let absent = registry.publish("a", upload(&registry, &adapter(2)), Condition::Absent).await;
    assert_eq!(absent.unwrap_err().kind, ErrorKind::Conflict);
    let (info, published) = publish(&registry, "a", 2).await;
    assert_eq!((published, info.source), (Published::Replaced, Source::Store));
    assert_eq!(names(&registry), ["a"]);
    drop(registry);
    let registry = world.open();
    assert_eq!(registry.get("a").unwrap().generation, info.generation);
    registry.remove("a", Condition::Always).await.unwrap();
    assert_eq!(registry.get("a").unwrap().generation, original.generation);
    assert_eq!(registry.acquire("a").await.unwrap().generation.as_str(), original.generation);
}

#[tokio::test]
async fn bad_uploads_are_refused_and_change_nothing() {
    let world = World::new();
    let registry = world.open();
    let mut wrong = adapter(1);
    wrong.config["r"] = serde_json::json!(4);
    let mut huge = adapter(1);
    huge.tensors.insert("x".into(), Tensor::f32(&[1 << 18], |_| 0.0));
    for (name, files, kind) in [
        ("a", &wrong, ErrorKind::Unprocessable),
        ("a", &huge, ErrorKind::TooLarge),
        ("a/b", &adapter(1), ErrorKind::BadRequest),
        ("base", &adapter(1), ErrorKind::BadRequest),
        ("tiny", &adapter(1), ErrorKind::BadRequest),
    ] {
        let error = registry.publish(name, upload(&registry, files), Condition::Always).await.unwrap_err();
        assert_eq!(error.kind, kind, "{error}");
    }
    let empty = registry.publish("a", registry.upload().unwrap(), Condition::Always).await.unwrap_err();
    assert!(empty.message.contains("adapter_config.json is missing"), "{empty}");
    assert!(registry.list().is_empty());
    for folder in ["objects", "names", "incoming"] {
        assert_eq!(std::fs::read_dir(world.root.path().join("store").join(folder)).unwrap().count(), 0, "{folder}");
    }
}

#[tokio::test]
async fn a_local_directory_or_an_archive_can_be_published() {
    let world = World::new();
    let registry = world.open();
    let folder = classifier(1).folder();
    std::fs::write(folder.path().join("labels.json"), r#"["a", "b", "c"]"#).unwrap();
    std::fs::write(folder.path().join("optimizer.pt"), vec![0; 2 << 20]).unwrap();
    let upload = registry.upload_from(folder.path()).unwrap();
    let (copied, _) = registry.publish("copied", upload, Condition::Always).await.unwrap();
    assert_eq!(copied.labels.unwrap(), ["a", "b", "c"]);
    let upload = registry.upload().unwrap();
    let file = upload.path().join("archive");
    let mut tar = tar::Builder::new(std::fs::File::create(&file).unwrap());
    for name in ["adapter_config.json", WEIGHTS, "labels.json"] {
        tar.append_path_with_name(folder.path().join(name), name).unwrap();
    }
    tar.finish().unwrap();
    upload.unpack(&file).unwrap();
    assert!(!file.exists());
    let (unpacked, _) = registry.publish("unpacked", upload, Condition::Always).await.unwrap();
    assert_eq!(unpacked.generation, copied.generation);
    // One content under two names: one copy in memory, one on disk.
    let (a, b) = (registry.acquire("copied").await.unwrap(), registry.acquire("unpacked").await.unwrap());
    assert!(Arc::ptr_eq(&a, &b));
    assert_eq!((registry.get("copied").unwrap().in_flight, world.gauge(&registry, "disk").0), (2, 1));
    registry.remove("copied", Condition::Always).await.unwrap();
    assert_eq!(registry.get("unpacked").unwrap().tier, Tier::Device);
    assert!(registry.upload_from(Path::new("/nowhere")).is_err());
    let empty = tempfile::tempdir().unwrap();
    assert_eq!(registry.upload_from(empty.path()).err().unwrap().kind, ErrorKind::Unprocessable);
}

#[tokio::test]
async fn more_adapters_than_fit_take_turns() {
    let mut world = World::new();
    for i in 0..6 {
        world.folder(&format!("a{i}"), &adapter(i));
    }
    let mut one = 0;
    for i in 0..6 {
        one = one.max(world.open().acquire(&format!("a{i}")).await.unwrap().bytes);
    }
    world.memory = 2 * one;
    let registry = world.open();
    for round in 0..3 {
        for i in 0..6 {
            let name = format!("a{i}");
            let adapter = registry.acquire(&name).await.unwrap();
            assert_eq!(adapter.generation.as_str(), registry.get(&name).unwrap().generation, "{round}");
            assert!(world.gauge(&registry, "device").1 <= 2 * one as i64);
        }
    }
    // All in use at once: more than the limit, and nobody is refused.
    let mut held = vec![];
    for i in 0..6 {
        held.push(registry.acquire(&format!("a{i}")).await.unwrap());
    }
    assert_eq!(world.gauge(&registry, "device"), (6, held.iter().map(|a| a.bytes as i64).sum()));
    drop(held);
    registry.acquire("a0").await.unwrap();
    assert_eq!(registry.list().iter().filter(|info| info.tier == Tier::Device).count(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_cold_adapter_is_read_once_for_all_who_wait() {
    let world = World::new();
    world.folder("a", &adapter(1));
    let registry = world.open();
    let waiting: Vec<_> = (0..16)
        .map(|_| {
            let registry = registry.clone();
            tokio::spawn(async move { registry.acquire("a").await.unwrap() })
        })
        .collect();
    let mut found = vec![];
    for one in waiting {
        found.push(one.await.unwrap());
    }
    assert!(found.iter().all(|adapter| Arc::ptr_eq(adapter, &found[0])));
    assert_eq!(world.metrics.adapter_load_seconds.with_label_values(&["disk"]).get_sample_count(), 1);
}

#[tokio::test]
async fn a_caller_that_goes_away_does_not_stop_the_load() {
    let world = World::new();
    world.folder("a", &adapter(1));
    let registry = world.open();
    let given_up = tokio::time::timeout(Duration::ZERO, registry.acquire("a")).await;
    assert!(given_up.is_err() || registry.get("a").unwrap().tier == Tier::Device);
    registry.acquire("a").await.unwrap();
    assert_eq!(world.metrics.adapter_load_seconds.with_label_values(&["disk"]).get_sample_count(), 1);
}

#[tokio::test]
async fn a_folder_whose_files_change_is_followed() {
    let world = World::new();
    let path = world.folder("a", &adapter(1));
    let registry = world.open();
    let before = registry.get("a").unwrap();
    adapter(2).write(&path);
    let adapter = registry.acquire("a").await.unwrap();
    assert_ne!(adapter.generation.as_str(), before.generation);
    assert_eq!(registry.get("a").unwrap().generation, adapter.generation.as_str());
    assert_eq!(registry.get("a").unwrap().tier, Tier::Device);
}

#[tokio::test]
async fn a_damaged_or_unfit_upload_is_kept_out_but_named() {
    let world = World::new();
    let registry = world.open();
    let (info, _) = publish(&registry, "bad", 1).await;
    publish(&registry, "good", 2).await;
    drop(registry);
    let object = world.object(&info);
    let mut config = adapter(1).config;
    config["lora_alpha"] = serde_json::json!(8);
    std::fs::write(object.join(CONFIG), config.to_string()).unwrap();
    let registry = world.open();
    let error = registry.acquire("bad").await.unwrap_err();
    assert!(error.message.contains("\"bad\"") && error.message.contains("damaged"), "{error}");
    drop(registry);
    config["r"] = serde_json::json!(8);
    std::fs::write(object.join(CONFIG), config.to_string()).unwrap();
    let registry = world.open();
    assert_eq!(names(&registry), ["good"]);
    for error in [registry.get("bad").unwrap_err(), registry.acquire("bad").await.unwrap_err()] {
        assert!(error.message.contains("\"bad\"") && error.message.contains("expected [8, 8]"), "{error}");
    }
    let absent = registry.publish("bad", upload(&registry, &adapter(1)), Condition::Absent).await;
    assert_eq!(absent.unwrap_err().kind, ErrorKind::Conflict);
    assert_eq!(publish(&registry, "bad", 1).await.1, Published::Replaced);
    registry.acquire("bad").await.unwrap();
    drop(registry);
    std::fs::remove_dir_all(&object).unwrap();
    let registry = world.open();
    assert_eq!(names(&registry), ["good"]);
    registry.remove("bad", Condition::Always).await.unwrap();
    assert_eq!(registry.get("bad").unwrap_err().kind, ErrorKind::NotFound);
}

#[tokio::test]
async fn damage_while_running_is_told_not_served() {
    let mut world = World::new();
    world.memory = 0;
    let registry = world.open();
    let (info, _) = publish(&registry, "a", 1).await;
    std::fs::write(world.object(&info).join(WEIGHTS), adapter(2).weights()).unwrap();
    let error = registry.acquire("a").await.unwrap_err();
    assert!(error.kind == ErrorKind::Internal && error.message.contains("damaged"), "{error}");
    // The same upload again heals it.
    publish(&registry, "a", 1).await;
    registry.acquire("a").await.unwrap();
}

#[tokio::test]
async fn numbers_that_are_not_finite_are_found_at_the_first_load() {
    let world = World::new();
    let mut files = adapter(1);
    let tensor = files.tensors.values_mut().next().unwrap();
    *tensor = Tensor::f32(&tensor.shape.clone(), |_| f32::NAN);
    world.folder("a", &files);
    let registry = world.open();
    let error = registry.acquire("a").await.unwrap_err();
    assert!(error.kind == ErrorKind::Unprocessable && error.message.contains("NaN"), "{error}");
}

#[tokio::test]
async fn a_base_called_like_a_stored_adapter_is_not_served() {
    let world = World::new();
    publish(&world.open(), "theirs@tenant", 1).await;
    let error = world.open_with("theirs").map(|_| ()).unwrap_err();
    assert!(error.kind == ErrorKind::Conflict && error.message.contains("theirs@tenant"), "{error}");
    let (info, _) = publish(&world.open(), "other", 1).await;
    let error = world.open_with("other").map(|_| ()).unwrap_err();
    let file = world.root.path().join("store/names/other").display().to_string();
    assert!(error.kind == ErrorKind::Conflict && error.message.contains(&file), "{error}");
    assert_eq!(world.open().get("other").unwrap().generation, info.generation);
    std::fs::write(&file, "damage").unwrap();
    world.open_with("other").map(|_| ()).unwrap_err();
}

#[tokio::test]
async fn an_upload_of_what_a_folder_holds_outlives_the_folder() {
    let world = World::new();
    let path = world.folder("a", &adapter(1));
    let registry = world.open();
    let (info, published) = publish(&registry, "a", 1).await;
    assert_eq!((published, info.source), (Published::Replaced, Source::Store));
    assert_eq!(publish(&registry, "a", 1).await.1, Published::Unchanged);
    drop(registry);
    std::fs::remove_dir_all(path).unwrap();
    assert_eq!(world.open().acquire("a").await.unwrap().generation.as_str(), info.generation);
}

#[tokio::test]
async fn a_damaged_folder_does_not_fail_the_same_content_in_the_store() {
    let mut world = World::new();
    world.memory = 0;
    let path = world.folder("folder", &adapter(1));
    let registry = world.open();
    publish(&registry, "stored", 1).await;
    std::fs::write(path.join(WEIGHTS), "damage").unwrap();
    // All ask before any load ends, those for the folder first.
    let folder = futures::future::join_all((0..4).map(|_| registry.acquire("folder")));
    let (folder, stored) = futures::join!(folder, registry.acquire("stored"));
    let stored = stored.unwrap();
    // The same content may have come from the store meanwhile.
    assert!(folder[0].is_err() && folder.iter().flatten().all(|a| a.generation == stored.generation));
}

#[tokio::test]
async fn a_load_that_began_before_the_entry_does_not_fail_it() {
    let mut world = World::new();
    world.memory = 0;
    let registry = world.open();
    publish(&registry, "a", 1).await;
    let entry = registry.inner.entry("a").unwrap().unwrap();
    let Lookup::Load(flight, _) = registry.inner.cache.get(&entry.generation, &entry.path) else { panic!() };
    let fail = async { flight.settle(Err(Error::internal("its files were gone")), |_| true).announce() };
    // Polled in this order: the request has joined the load when that fails.
    let (acquired, ()) = futures::join!(registry.acquire("a"), fail);
    acquired.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn old_files_stay_until_the_old_entry_cannot_be_found() {
    let world = World::new();
    let registry = world.open();
    let (old, _) = publish(&registry, "a", 1).await;
    let name = world.root.path().join("store/names/a");
    let replacing = {
        // Keeps the new entry from becoming visible.
        let names = registry.inner.names.read().unwrap();
        let (registry, record) = (registry.clone(), std::fs::read(&name).unwrap());
        let replacing = tokio::spawn(async move { publish(&registry, "a", 2).await });
        let start = Instant::now();
        while std::fs::read(&name).unwrap() == record {
            assert!(start.elapsed().as_secs() < 60, "the name was not replaced on disk");
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(100));
        assert!(world.object(&old).exists());
        drop(names);
        replacing
    };
    replacing.await.unwrap();
    assert!(!world.object(&old).exists());
}

#[tokio::test]
async fn loads_and_uploads_wait_for_memory() {
    let world = World::new();
    world.folder("a", &adapter(1));
    let registry = world.open();
    // As much as there is for one that is larger than that.
    let room = registry.inner.room(1 << 40).await.unwrap();
    assert_eq!((room.num_permits() as u64, registry.inner.room.available_permits()), (LOAD_MEMORY, 0));
    let (loader, publisher) = (registry.clone(), registry.clone());
    let load = tokio::spawn(async move { loader.acquire("a").await });
    let publish = tokio::spawn(async move { publish(&publisher, "b", 2).await });
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!load.is_finished() && !publish.is_finished());
    drop(room);
    load.await.unwrap().unwrap();
    publish.await.unwrap();
    assert_eq!(registry.inner.room.available_permits() as u64, LOAD_MEMORY);
}

/// Readers of several names go on without an error, and without a generation their name never stood for, while
/// these are replaced and removed, with a tier too small for all.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn traffic_goes_on_while_adapters_change() {
    let mut world = World::new();
    world.memory = 5000;
    let registry = world.open();
    let seeds = |name: usize| [name * 10, name * 10 + 1];
    let mut known = vec![];
    for name in 0..4 {
        let mut generations = HashSet::new();
        for seed in seeds(name) {
            generations.insert(publish(&registry, &format!("a{name}"), seed).await.0.generation);
        }
        known.push(generations);
    }
    let known = Arc::new(known);
    let (done, served) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let readers: Vec<_> = (0..4)
        .map(|reader| {
            let (registry, known, done, served) = (registry.clone(), known.clone(), done.clone(), served.clone());
            tokio::spawn(async move {
                let mut turn = reader;
                while !done.load(Ordering::Relaxed) {
                    let name = turn % 4;
                    turn += 1;
                    let adapter = registry.acquire(&format!("a{name}")).await.unwrap();
                    assert!(known[name].contains(adapter.generation.as_str()));
                    served.fetch_add(1, Ordering::Relaxed);
                    tokio::task::yield_now().await;
                }
            })
        })
        .collect();
    for round in 0..24 {
        publish(&registry, &format!("a{}", round % 4), seeds(round % 4)[round / 4 % 2]).await;
        publish(&registry, "other", 100 + round % 3).await;
        registry.remove("other", Condition::Always).await.unwrap();
    }
    done.store(true, Ordering::Relaxed);
    for reader in readers {
        reader.await.unwrap();
    }
    assert!(served.load(Ordering::Relaxed) > 100);
    assert_eq!(std::fs::read_dir(world.root.path().join("store/objects")).unwrap().count(), 4);
    assert!(registry.list().iter().all(|info| info.in_flight == 0));
    assert!(world.gauge(&registry, "device").1 <= 5000 + 4 * 2000);
}
