//! Blends of adapters, as requests name them.

use serde_json::Value;

use super::fields::Fields;
use crate::Result;
use crate::adapter::{Blend, Merge};

/// The blend that a request asks for: `adapters`, a list of names and weights whose sum is meant, or LoRAX's
/// `merged_adapters`.
pub fn read(f: &Fields) -> Result<Option<Blend>> {
    match (f.get("adapters"), f.get("merged_adapters")) {
        (None, None) => Ok(None),
        (Some(_), None) => listed(f).map(Some).map_err(|e| e.param("adapters")),
        (None, Some(_)) => merged(&f.object("merged_adapters")?).map(Some).map_err(|e| e.param("merged_adapters")),
        (Some(_), Some(_)) => Err(f.wrong("adapters", "and merged_adapters exclude each other")),
    }
}

fn listed(f: &Fields) -> Result<Blend> {
    let mut parts = vec![];
    for (i, part) in f.list("adapters")?.unwrap_or_default().iter().enumerate() {
        let wrong = |what: &str| {
            f.wrong(&format!("adapters[{i}]"), format!("{what}; expected {{\"name\": TEXT, \"weight\": NUMBER}}"))
        };
        let Value::Object(map) = part else { return Err(wrong("is no object")) };
        if let Some(key) = map.keys().find(|key| !["name", "weight"].contains(&key.as_str())) {
            return Err(wrong(&format!("has the key {key:?}")));
        }
        let Some(Value::String(name)) = map.get("name") else { return Err(wrong("has no name that is a text")) };
        let weight = match map.get("weight") {
            None => 1.0,
            Some(weight) => weight.as_f64().ok_or_else(|| wrong("has a weight that is no number"))?,
        };
        parts.push((name.clone(), weight as f32));
    }
    Blend::new(parts, Merge::Sum)
}

fn merged(f: &Fields) -> Result<Blend> {
    let ids = f.texts("ids")?.ok_or_else(|| f.wrong("ids", "is needed: a list of adapters"))?;
    let mut weights = vec![1.0; ids.len()];
    if let Some(list) = f.list("weights")? {
        let wrong = || f.wrong("weights", format!("has to have a number for each of the {} ids", ids.len()));
        let numbers: Option<Vec<f32>> = list.iter().map(|w| w.as_f64().map(|w| w as f32)).collect();
        weights = numbers.filter(|numbers| numbers.len() == ids.len()).ok_or_else(wrong)?;
    }
    let (strategy, election) = (f.text("merge_strategy")?, f.text("majority_sign_method")?);
    // Of more digits than other numbers: it decides how many are kept. LoRAX's client sends 0 where there is none.
    let density = f.real("density")?.and(f.get("density")).and_then(Value::as_f64).filter(|&density| density != 0.0);
    let merge = Merge::named(strategy.as_deref().unwrap_or("linear"), density, election.as_deref())?;
    Blend::new(ids.into_iter().zip(weights).collect(), merge)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blend(json: &str) -> Result<Option<Blend>> {
        read(&Fields::parse(json.as_bytes()).unwrap())
    }

    #[test]
    fn both_ways_to_name_one() {
        let parts = |names: &[(&str, f32)]| names.iter().map(|(n, w)| (n.to_string(), *w)).collect();
        let sum = blend(r#"{"adapters": [{"name": "a", "weight": 0.7}, {"name": "b"}]}"#).unwrap();
        assert_eq!(sum, Some(Blend::new(parts(&[("a", 0.7), ("b", 1.0)]), Merge::Sum).unwrap()));
        let ties = blend(
            r#"{"merged_adapters": {"ids": ["a", "b"], "weights": [1, -2], "merge_strategy": "ties", "density": 0.5}}"#,
        );
        let merge = Merge::named("ties", Some(0.5), Some("total")).unwrap();
        assert_eq!(ties.unwrap(), Some(Blend::new(parts(&[("a", 1.0), ("b", -2.0)]), merge).unwrap()));
        // As LoRAX's client sends it.
        let linear = blend(
            r#"{"merged_adapters": {"ids": ["a", "b"], "weights": [1, 1], "merge_strategy": null, "density": 0.0}}"#,
        );
        let merge = Merge::named("linear", None, None).unwrap();
        assert_eq!(linear.unwrap(), Some(Blend::new(parts(&[("a", 1.0), ("b", 1.0)]), merge).unwrap()));
        assert_eq!(blend("{}").unwrap(), None);
    }

    #[test]
    fn what_is_wrong_is_told() {
        for (json, what) in [
            (r#"{"adapters": []}"#, "0 adapters"),
            (r#"{"adapters": "a"}"#, "expected a list"),
            (r#"{"adapters": ["a"]}"#, "adapters[0] is no object"),
            (r#"{"adapters": [{"name": "a"}, {"weight": 1}]}"#, "adapters[1] has no name"),
            (r#"{"adapters": [{"name": "a", "weight": "1"}]}"#, "no number"),
            (r#"{"adapters": [{"name": "a", "scale": 1}]}"#, "\"scale\""),
            (r#"{"adapters": [{"name": "a", "weight": 1e300}]}"#, "finite"),
            (r#"{"adapters": [{"name": "a"}], "merged_adapters": {"ids": ["a"]}}"#, "exclude"),
            (r#"{"merged_adapters": {}}"#, "ids is needed"),
            (r#"{"merged_adapters": {"ids": ["a", "b"], "weights": [1]}}"#, "each of the 2 ids"),
            (r#"{"merged_adapters": {"ids": ["a", "b"], "merge_strategy": "svd"}}"#, "svd"),
            (r#"{"merged_adapters": {"ids": ["a", "b"], "merge_strategy": "ties", "density": 2}}"#, "density is 2"),
        ] {
            let error = blend(json).unwrap_err();
            assert!(error.message.contains(what), "{json}: {error}");
        }
    }
}
