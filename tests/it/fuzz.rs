//! The seeds of the fuzz targets, whole, cut, and with wrong bytes.

use std::path::Path;

#[path = "../../fuzz/inputs.rs"]
mod inputs;

/// Seeds whose numbers are left out, so that the wrong bytes are in what describes them.
const REFUSED: [&str; 4] = ["dora_r4", "embed_and_head", "lora_bias", "rank_alpha_pattern"];
/// Cuts, and wrong bytes, of each seed.
const MUTATIONS: usize = 60;

fn replay(target: &str, run: fn(&[u8]) -> bool) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let mut seeds: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|file| file.unwrap().path()).collect();
    seeds.sort();
    assert!(seeds.len() >= 4, "{}: {seeds:?}", folder.display());
    for path in seeds {
        let (seed, name) = (std::fs::read(&path).unwrap(), path.file_name().unwrap().to_str().unwrap());
        assert_eq!(run(&seed), !REFUSED.contains(&name), "{}", path.display());
        let mut state = seed.len() as u64;
        let mut next = |below: usize| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as usize % below
        };
        for _ in 0..MUTATIONS {
            run(&seed[..next(seed.len())]);
            let mut wrong = seed.clone();
            for _ in 0..=next(4) {
                // Headers stand in front.
                let at = next(seed.len().min(2048));
                wrong[at] = [0, 1, 0x7f, 0xff, b'9', b'-'][next(6)];
            }
            run(&wrong);
        }
    }
}

#[test]
fn adapters() {
    replay("adapter", inputs::adapter);
}

#[test]
fn archives() {
    replay("archive", inputs::archive);
}

#[test]
fn ggufs() {
    replay("gguf", inputs::gguf);
}
