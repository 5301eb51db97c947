//! Small adapters made in code, and a bucket to put them in, for the tests of this layer.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use object_store::memory::InMemory;
use object_store::path::Path as Location;
use object_store::{
    CopyOptions, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    ObjectStoreExt, PutMultipartOptions, PutOptions, PutPayload, PutResult,
};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::base::{Architecture, Family, ModelConfig, Projection, Rope};

/// A decoder of two layers: q is 12×8, k and v are 6×8, o is 8×12, gate and up are 10×8, down is 8×10.
pub fn tiny() -> ModelConfig {
    ModelConfig {
        family: Family::Llama,
        vocab_size: 32,
        hidden_size: 8,
        intermediate_size: 10,
        layers: 2,
        heads: 2,
        kv_heads: 1,
        head_dim: 6,
        norm_eps: 1e-5,
        rope: Some(Rope::plain(10_000.0, 6)),
        windows: vec![],
        architecture: Architecture::of(Family::Llama),
        context: 64,
        tie_word_embeddings: true,
        predicts: true,
        bos_token: None,
        eos_tokens: vec![],
    }
}

pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

#[derive(Clone)]
pub struct Tensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

impl Tensor {
    pub fn f32(shape: &[usize], values: impl Fn(usize) -> f32) -> Self {
        let bytes = (0..shape.iter().product()).flat_map(|i| values(i).to_le_bytes()).collect();
        Tensor { dtype: Dtype::F32, shape: shape.to_vec(), bytes }
    }
}

/// A PEFT directory under construction.
#[derive(Clone)]
pub struct Files {
    pub config: Value,
    pub tensors: BTreeMap<String, Tensor>,
}

/// Rank 2 on q and v of both layers; `seed` makes the numbers, and so the generation.
pub fn adapter(seed: usize) -> Files {
    adapter_of_rank(seed, 2)
}

pub fn adapter_of_rank(seed: usize, rank: usize) -> Files {
    let config = json!({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "tiny", "r": rank, "lora_alpha": 4,
        "target_modules": ["q_proj", "v_proj"],
    });
    let mut files = Files { config, tensors: BTreeMap::new() };
    let base = tiny();
    for layer in 0..base.layers {
        for projection in [Projection::Q, Projection::V] {
            let (outputs, inputs) = base.shape(projection);
            let module = format!("base_model.model.model.layers.{layer}.{}", base.family.path(projection));
            let value = move |i| (seed * 1000 + layer * 100 + i) as f32 / 8.0;
            files.tensors.insert(format!("{module}.lora_A.weight"), Tensor::f32(&[rank, inputs], value));
            files.tensors.insert(format!("{module}.lora_B.weight"), Tensor::f32(&[outputs, rank], value));
        }
    }
    files
}

/// The same with a head of three classes.
pub fn classifier(seed: usize) -> Files {
    let mut files = adapter(seed);
    files.config["task_type"] = json!("SEQ_CLS");
    files.config["modules_to_save"] = json!(["classifier", "score"]);
    files.tensors.insert("base_model.model.score.weight".into(), Tensor::f32(&[3, 8], |i| i as f32));
    files
}

impl Files {
    pub fn weights(&self) -> Vec<u8> {
        let views = self
            .tensors
            .iter()
            .map(|(name, t)| (name.clone(), TensorView::new(t.dtype, t.shape.clone(), &t.bytes).unwrap()));
        safetensors::serialize(views, None).unwrap()
    }

    pub fn write(&self, directory: &Path) {
        std::fs::create_dir_all(directory).unwrap();
        std::fs::write(directory.join("adapter_config.json"), self.config.to_string()).unwrap();
        std::fs::write(directory.join("adapter_model.safetensors"), self.weights()).unwrap();
    }

    /// The same with the weights in two shards.
    pub fn sharded(&self) -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("adapter_config.json"), self.config.to_string()).unwrap();
        let (mut map, half) = (serde_json::Map::new(), self.tensors.len() / 2);
        for (number, shard) in ["00001-of-00002", "00002-of-00002"].iter().enumerate() {
            let name = format!("adapter_model-{shard}.safetensors");
            let tensors = self.tensors.iter().enumerate().filter(|(i, _)| (*i >= half) == (number == 1));
            let tensors: BTreeMap<_, _> = tensors.map(|(_, (name, t))| (name.clone(), t.clone())).collect();
            map.extend(tensors.keys().map(|tensor| (tensor.clone(), json!(name))));
            let files = Files { tensors, ..self.clone() };
            std::fs::write(folder.path().join(name), files.weights()).unwrap();
        }
        let index = json!({"metadata": {"total_size": 1}, "weight_map": map});
        std::fs::write(folder.path().join("adapter_model.safetensors.index.json"), index.to_string()).unwrap();
        folder
    }

    pub fn folder(&self) -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        self.write(folder.path());
        folder
    }
}

/// How a bucket's network is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Network {
    #[default]
    Well,
    /// Every request fails.
    Down,
    /// No request is answered.
    Silent,
    /// Bodies end early.
    Cut,
    /// Files may be listed but not read.
    Private,
}

/// A bucket in memory, with a network that is as it is told to be. Adapters lie below `prefix`.
#[derive(Debug, Default)]
pub struct Bucket {
    memory: InMemory,
    network: Mutex<Network>,
    /// What each next request for weights has done to the bucket by the time it is answered.
    changes: Mutex<VecDeque<(Location, Vec<u8>)>>,
    /// Lists that were asked for.
    pub lists: AtomicUsize,
    /// Files that were asked for.
    pub gets: AtomicUsize,
}

impl Bucket {
    pub fn set(&self, network: Network) {
        *self.network.lock().unwrap() = network;
    }

    pub async fn put(&self, name: &str, files: &Files) {
        self.put_file(name, "adapter_config.json", files.config.to_string().into_bytes()).await;
        self.put_file(name, "adapter_model.safetensors", files.weights()).await;
    }

    pub async fn put_file(&self, name: &str, file: &str, content: Vec<u8>) {
        self.memory.put(&Self::location(name, file), content.into()).await.unwrap();
    }

    pub async fn remove(&self, name: &str) {
        let all: Vec<ObjectMeta> =
            self.memory.list(Some(&Location::from_iter(["prefix", name]))).try_collect().await.unwrap();
        for meta in all {
            self.memory.delete(&meta.location).await.unwrap();
        }
    }

    /// Lets the next request for weights be followed by this change.
    pub fn change_under_fetch(&self, name: &str, file: &str, content: Vec<u8>) {
        self.changes.lock().unwrap().push_back((Self::location(name, file), content));
    }

    fn location(name: &str, file: &str) -> Location {
        Location::from_iter(["prefix"].into_iter().chain(name.split('/')).chain([file]))
    }

    /// What the network makes of a request.
    async fn send(&self) -> object_store::Result<Network> {
        let network = *self.network.lock().unwrap();
        match network {
            Network::Down => {
                let source =
                    std::io::Error::other("connection refused at memory://user:secret@host/?sig=secret").into();
                Err(object_store::Error::Generic { store: "test", source })
            }
            Network::Silent => std::future::pending().await,
            other => Ok(other),
        }
    }
}

impl fmt::Display for Bucket {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a bucket")
    }
}

/// An [`ObjectStore`] of which only what reads is of use; adapters are put past the network.
#[derive(Debug)]
pub struct Net(pub std::sync::Arc<Bucket>);

impl fmt::Display for Net {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[async_trait::async_trait]
impl ObjectStore for Net {
    async fn put_opts(&self, at: &Location, body: PutPayload, o: PutOptions) -> object_store::Result<PutResult> {
        self.0.memory.put_opts(at, body, o).await
    }

    async fn put_multipart_opts(
        &self,
        at: &Location,
        options: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        self.0.memory.put_multipart_opts(at, options).await
    }

    async fn get_opts(&self, at: &Location, options: GetOptions) -> object_store::Result<GetResult> {
        let (bucket, head) = (&self.0, options.head);
        bucket.gets.fetch_add(usize::from(!head), Ordering::Relaxed);
        let network = bucket.send().await?;
        if network == Network::Private && !head {
            let source = std::io::Error::other("403").into();
            return Err(object_store::Error::PermissionDenied { path: at.to_string(), source });
        }
        let got = bucket.memory.get_opts(at, options).await?;
        if head {
            return Ok(got);
        }
        let is_weights = at.filename().is_some_and(|name| name.ends_with(".safetensors"));
        let change = if is_weights { bucket.changes.lock().unwrap().pop_front() } else { None };
        if let Some((at, content)) = change {
            bucket.memory.put(&at, content.into()).await?;
        }
        if network == Network::Cut {
            let (meta, range) = (got.meta.clone(), got.range.clone());
            let (attributes, extensions) = (got.attributes.clone(), got.extensions.clone());
            let whole = got.bytes().await?;
            let half = whole.slice(..whole.len() / 2);
            let payload = GetResultPayload::Stream(futures::stream::once(async { Ok(half) }).boxed());
            return Ok(GetResult { payload, meta, range, attributes, extensions });
        }
        Ok(got)
    }

    fn delete_stream(
        &self,
        all: BoxStream<'static, object_store::Result<Location>>,
    ) -> BoxStream<'static, object_store::Result<Location>> {
        self.0.memory.delete_stream(all)
    }

    fn list(&self, prefix: Option<&Location>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        self.0.lists.fetch_add(1, Ordering::Relaxed);
        let (bucket, prefix) = (self.0.clone(), prefix.cloned());
        let objects = async move {
            bucket.send().await?;
            Ok::<_, object_store::Error>(bucket.memory.list(prefix.as_ref()))
        };
        futures::stream::once(objects).try_flatten().boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Location>) -> object_store::Result<ListResult> {
        self.0.memory.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Location, to: &Location, options: CopyOptions) -> object_store::Result<()> {
        self.0.memory.copy_opts(from, to, options).await
    }
}
