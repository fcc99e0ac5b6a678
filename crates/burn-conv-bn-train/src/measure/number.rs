//! Floats in JSON, which has no NaN and no infinity: these are the texts `"NaN"`, `"Infinity"` and `"-Infinity"`.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

const NON_FINITE: [(&str, f64); 3] = [
    ("NaN", f64::NAN),
    ("Infinity", f64::INFINITY),
    ("-Infinity", f64::NEG_INFINITY),
];

#[derive(Deserialize)]
#[serde(untagged)]
enum Stored {
    Finite(f64),
    Text(String),
}

/// For `#[serde(with = "number")]`.
pub(crate) fn serialize<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    let is_it = |other: f64| *value == other || value.is_nan() && other.is_nan();
    match NON_FINITE.iter().find(|(_, other)| is_it(*other)) {
        Some((text, _)) => serializer.serialize_str(text),
        None => serializer.serialize_f64(*value),
    }
}

pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    match Stored::deserialize(deserializer)? {
        Stored::Finite(value) => Ok(value),
        Stored::Text(text) => match NON_FINITE.iter().find(|(other, _)| *other == text) {
            Some((_, value)) => Ok(*value),
            None => Err(de::Error::custom(format!("{text:?} is no number"))),
        },
    }
}

/// The same for a list: `#[serde(with = "number::list")]`.
pub(crate) mod list {
    use super::*;

    #[derive(Serialize, Deserialize)]
    struct Item(#[serde(with = "super")] f64);

    pub(crate) fn serialize<S: Serializer>(
        values: &[f64],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(values.iter().map(|&value| Item(value)))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<f64>, D::Error> {
        let items = Vec::<Item>::deserialize(deserializer)?;
        Ok(items.into_iter().map(|item| item.0).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Serialize, Deserialize)]
    struct Values {
        #[serde(with = "super")]
        one: f64,
        #[serde(with = "list")]
        many: Vec<f64>,
    }

    #[test]
    fn every_float_survives_json() {
        let finite = [1.0 / 3.0, -0.0, 2.0, 1e-300, f64::MAX];
        let others = [f64::INFINITY, f64::NEG_INFINITY, f64::NAN];
        let many: Vec<f64> = finite.into_iter().chain(others).collect();
        for &one in &many {
            let many = many.clone();
            let json = serde_json::to_string(&Values { one, many }).unwrap();
            let texts = r#""Infinity","-Infinity","NaN"]"#;
            assert!(json.contains(texts), "{json}");
            let read: Values = serde_json::from_str(&json).unwrap();
            assert_eq!(read.one.to_bits(), one.to_bits(), "{json}");
        }
        let json = serde_json::to_string(&Values {
            one: 0.0,
            many: many.clone(),
        })
        .unwrap();
        let read: Values = serde_json::from_str(&json).unwrap();
        let bits =
            |values: &[f64]| -> Vec<u64> { values.iter().map(|value| value.to_bits()).collect() };
        assert_eq!(bits(&read.many), bits(&many), "{json}");

        for wrong in ["\"nan\"", "null", "\"1\""] {
            let json = format!("{{\"one\": {wrong}, \"many\": []}}");
            assert!(serde_json::from_str::<Values>(&json).is_err(), "{json}");
        }
    }
}
