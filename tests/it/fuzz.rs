//! The seeds of the fuzz targets, whole, cut, and with wrong bytes.

use std::path::Path;

#[path = "../../fuzz/inputs.rs"]
mod inputs;

/// Seeds whose numbers are left out, so that the wrong bytes are in what describes them. Other seeds that are refused say so in
/// their names.
const REFUSED: [&str; 4] = ["dora_r4", "embed_and_head", "lora_bias", "rank_alpha_pattern"];
/// What is put into a seed.
const WRONG: [u8; 12] = [0, 1, 0x7f, 0xff, b'9', b'-', b'"', b'{', b']', b'\\', b'*', b'\n'];

/// Cuts, and wrong bytes, of each seed.
fn mutations() -> usize {
    std::env::var("LORAMUX_TEST_MUTATIONS").map_or(60, |text| text.parse().expect("a number"))
}

fn replay(target: &str, run: fn(&[u8]) -> bool) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let mut seeds: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|file| file.unwrap().path()).collect();
    seeds.sort();
    assert!(seeds.len() >= 4, "{}: {seeds:?}", folder.display());
    for path in seeds {
        let (seed, name) = (std::fs::read(&path).unwrap(), path.file_name().unwrap().to_str().unwrap());
        let refused = REFUSED.contains(&name) || name.starts_with("refused-");
        assert_eq!(run(&seed), !refused, "{}", path.display());
        let mut state = seed.len() as u64;
        let mut next = |below: usize| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as usize % below
        };
        for _ in 0..mutations() {
            if seed.is_empty() {
                break;
            }
            run(&seed[..next(seed.len())]);
            let mut wrong = seed.clone();
            for _ in 0..=next(4) {
                // Headers stand in front.
                let at = next(seed.len().min(2048));
                wrong[at] = WRONG[next(WRONG.len())];
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

#[test]
fn languages() {
    replay("language", inputs::language);
}

#[test]
fn bases() {
    replay("base", inputs::base);
}

#[test]
fn keys() {
    replay("keys", inputs::keys);
}

#[test]
fn requests() {
    replay("request", inputs::request);
}

#[test]
fn grammars() {
    replay("grammar", inputs::grammar);
}
