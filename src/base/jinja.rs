//! What transformers adds to Jinja for chat templates: `raise_exception`, `strftime_now`, its own `tojson`, and the
//! `generation` block.

use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Value};
use regex::Regex;
use serde::Serialize;
use serde_json::Value as Json;
use serde_json::ser::{Formatter, PrettyFormatter};

/// Gives `environment` the functions and the filter.
pub fn extend(environment: &mut Environment) {
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", |message: String| -> Result<String, Error> { Err(raised(message)) });
    environment.add_function("strftime_now", |format: String| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        strftime(&format, now)
    });
    environment.add_filter("tojson", tojson);
}

fn raised(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

/// `{% generation %}` marks the assistant's words for training; rendering only passes its body through.
pub fn without_generation_blocks(template: &str) -> String {
    let tag = Regex::new(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}").expect("the pattern is constant");
    tag.replace_all(template, |found: &regex::Captures| {
        let word = if found.get(2).is_some() { "endif" } else { "if true" };
        format!("{{%{} {word} {}%}}", &found[1], &found[3])
    })
    .into_owned()
}

/// Python's `json.dumps` with `ensure_ascii=False`: nothing is escaped for HTML, `", "` and `": "` between items.
fn tojson(value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    if options.get::<Option<bool>>("ensure_ascii")? == Some(true) {
        return Err(raised("tojson: ensure_ascii=true is not supported"));
    }
    let sort_keys = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    options.assert_all_used()?;
    let failed = |e: serde_json::Error| raised(format!("tojson: {e}"));
    let mut value = json(value, 0)?;
    if sort_keys {
        value.sort_all_objects();
    }
    let mut out = Vec::new();
    match indent {
        Some(n) if n <= 16 => {
            let spaces = " ".repeat(n);
            let pretty = PrettyFormatter::with_indent(spaces.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, pretty))
        }
        Some(n) => return Err(raised(format!("tojson: indent={n} is more than 16"))),
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, Spaced)),
    }
    .map_err(failed)?;
    Ok(String::from_utf8_lossy(&out).into_owned().into())
}

/// JSON as a template sees it.
pub fn value(json: &Json) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(b) => Value::from(*b),
        Json::Number(n) => match (n.as_i64(), n.as_u64(), n.as_f64()) {
            (Some(i), _, _) => Value::from(i),
            (None, Some(u), _) => Value::from(u),
            (None, None, x) => Value::from(x.unwrap_or(f64::NAN)),
        },
        Json::String(s) => Value::from(s.as_str()),
        Json::Array(list) => list.iter().map(value).collect(),
        Json::Object(fields) => Value::from_pairs(fields.iter().map(|(k, v)| (k.as_str(), value(v)))),
    }
}

/// A template's value as JSON.
fn json(value: &Value, depth: usize) -> Result<Json, Error> {
    if depth > 128 {
        return Err(raised("tojson: a value is nested more than 128 deep"));
    }
    Ok(match value.kind() {
        ValueKind::None => Json::Null,
        ValueKind::Bool => value.is_true().into(),
        ValueKind::Number if value.is_integer() => match (i64::try_from(value.clone()), u64::try_from(value.clone())) {
            (Ok(i), _) => i.into(),
            (_, Ok(u)) => u.into(),
            _ => return Err(raised(format!("tojson: {value} is too large"))),
        },
        ValueKind::Number => f64::try_from(value.clone())?.into(),
        ValueKind::String => value.as_str().unwrap_or_default().into(),
        ValueKind::Seq | ValueKind::Iterable => {
            value.try_iter()?.map(|item| json(&item, depth + 1)).collect::<Result<Vec<_>, _>>()?.into()
        }
        ValueKind::Map => {
            let fields = value.try_iter()?.map(|key| {
                let item = json(&value.get_item(&key)?, depth + 1)?;
                Ok((key.as_str().map_or_else(|| key.to_string(), str::to_string), item))
            });
            Json::Object(fields.collect::<Result<_, Error>>()?)
        }
        other => return Err(raised(format!("tojson: {other} is no JSON"))),
    })
}

/// One line, with a space after each comma and colon.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }
    fn begin_object_key<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }
    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
/// The first day of 1970 was a Thursday.
const WEEKDAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];

/// Python's `strftime` of a time in seconds since 1970, in UTC. A directive it does not know is an error.
fn strftime(format: &str, seconds: u64) -> Result<String, Error> {
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day, day_of_year) = date(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let (month_name, weekday) = (MONTHS[month as usize - 1], WEEKDAYS[(days % 7) as usize]);
    let mut out = String::new();
    let mut rest = format.chars();
    while let Some(c) = rest.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive = rest.next();
        // `%-d` is `%d` without the leading zero.
        let bare = directive == Some('-');
        if bare {
            directive = rest.next();
        }
        let mut number = |n: u64, width: usize| {
            let width = if bare { 0 } else { width };
            out.push_str(&format!("{n:0width$}"));
        };
        match directive {
            Some('Y') => number(year, 4),
            Some('y') => number(year % 100, 2),
            Some('m') => number(month, 2),
            Some('d') => number(day, 2),
            Some('H') => number(hour, 2),
            Some('I') => number((hour + 11) % 12 + 1, 2),
            Some('M') => number(minute, 2),
            Some('S') => number(second, 2),
            Some('j') => number(day_of_year, 3),
            Some('B') => out.push_str(month_name),
            Some('b') => out.push_str(&month_name[..3]),
            Some('A') => out.push_str(weekday),
            Some('a') => out.push_str(&weekday[..3]),
            Some('p') => out.push_str(if hour < 12 { "AM" } else { "PM" }),
            Some('F') => out.push_str(&format!("{year:04}-{month:02}-{day:02}")),
            Some('T') => out.push_str(&format!("{hour:02}:{minute:02}:{second:02}")),
            Some('%') => out.push('%'),
            other => {
                let found = other.map_or("an end".to_string(), |c| format!("{c:?}"));
                return Err(raised(format!("strftime_now: {found} after % in {format:?} is not supported")));
            }
        }
    }
    Ok(out)
}

/// Year, month, day and day of the year of a day counted from 1970-01-01, in the Gregorian calendar.
fn date(days: u64) -> (u64, u64, u64, u64) {
    let leap = |year: u64| (year.is_multiple_of(4) && !year.is_multiple_of(100)) || year.is_multiple_of(400);
    // 146,097 days make 400 years exactly.
    let (mut year, mut left) = (1970 + 400 * (days / 146_097), days % 146_097);
    while left >= 365 + u64::from(leap(year)) {
        left -= 365 + u64::from(leap(year));
        year += 1;
    }
    let day_of_year = left + 1;
    let lengths = [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while left >= lengths[month] {
        left -= lengths[month];
        month += 1;
    }
    (year, month as u64 + 1, left + 1, day_of_year)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(template: &str) -> Result<String, Error> {
        let mut environment = Environment::new();
        extend(&mut environment);
        let value = serde_json::json!({ "z": [1, 2.5, null, true], "a": "<é> & 'x' \"y\"", "e": {} });
        environment.render_str(template, minijinja::context! { value => super::value(&value) })
    }

    #[test]
    fn json_is_as_python_writes_it() {
        let line = r#"{"z": [1, 2.5, null, true], "a": "<é> & 'x' \"y\"", "e": {}}"#;
        assert_eq!(render("{{ value | tojson }}").unwrap(), line);
        let pretty = "{\n  \"z\": [\n    1,\n    2.5,\n    null,\n    true\n  ],\n  \"a\": \"<é> & 'x' \\\"y\\\"\",\n  \"e\": {}\n}";
        assert_eq!(render("{{ value | tojson(indent=2) }}").unwrap(), pretty);
        assert!(render("{{ value | tojson(sort_keys=true) }}").unwrap().starts_with("{\"a\": "));
        assert!(render("{{ value | tojson(indent=1000000) }}").is_err());
        assert!(render("{{ value | tojson(what=1) }}").is_err());
        assert!(render("{{ missing | tojson }}").is_err());
        assert_eq!(
            render("{{ {'n': 18446744073709551615, 'i': -3} | tojson }}").unwrap(),
            r#"{"n": 18446744073709551615, "i": -3}"#
        );
    }

    #[test]
    fn dates_are_as_python_writes_them() {
        // 2024-02-29 13:05:09 UTC, a Thursday.
        let at = 1_709_211_909;
        let format = "%Y %y %m %d %-d %H %I %M %S %j %B %b %A %a %p %F %T %%";
        let expected = "2024 24 02 29 29 13 01 05 09 060 February Feb Thursday Thu PM 2024-02-29 13:05:09 %";
        assert_eq!(strftime(format, at).unwrap(), expected);
        assert_eq!(strftime("%d %b %Y %I%p", 0).unwrap(), "01 Jan 1970 12AM");
        assert_eq!(strftime("%F", 4_107_542_400).unwrap(), "2100-03-01");
        assert_eq!(strftime("%F", 951_782_400).unwrap(), "2000-02-29");
        assert_eq!(strftime("%F %j", 1_735_603_200).unwrap(), "2024-12-31 366");
        for bad in ["%", "%-", "%Q"] {
            assert!(strftime(bad, 0).unwrap_err().to_string().contains("not supported"), "{bad}");
        }
        assert!(strftime("%Y", u64::MAX).is_ok());
        assert_eq!(render("{{ strftime_now('%Y') | length }}").unwrap(), "4");
    }

    #[test]
    fn generation_blocks_pass_their_body_through() {
        let template = without_generation_blocks("a {%- generation %}b{% endgeneration -%} c{% set generation = 1 %}");
        assert_eq!(render(&template).unwrap(), "abc");
    }
}
