//! What a benchmark has to say, and its two forms: Markdown, and an HTML file that needs no other.

use super::plot;
pub use super::plot::{Axis, Plot, Point, Series};
use crate::Result;

#[derive(Debug, Clone, Default)]
pub struct Report {
    pub title: String,
    pub blocks: Vec<Block>,
}

/// Texts are plain: what Markdown or HTML would read as markup is shown as it is.
#[derive(Debug, Clone)]
pub enum Block {
    Heading(String),
    Text(String),
    List(Vec<String>),
    Table(Table),
    Plot(Plot),
    /// Formulas and commands, as they are.
    Code(String),
    /// Set apart, e.g. that numbers are extrapolated and not measured.
    Notice(String),
}

/// Its first column says what a row is about and stands on the left, the others on the right.
#[derive(Debug, Clone, Default)]
pub struct Table {
    pub columns: Vec<String>,
    pub rows: Vec<Vec<String>>,
}

impl Table {
    /// The rows, each with as many cells as there are columns.
    fn rows(&self) -> impl Iterator<Item = impl Iterator<Item = &str>> {
        let columns = self.columns.len();
        self.rows.iter().map(move |row| (0..columns).map(|c| row.get(c).map_or("", String::as_str)))
    }
}

impl Report {
    pub fn markdown(&self) -> String {
        let mut out = format!("# {}\n", plain(&self.title));
        for block in &self.blocks {
            out += "\n";
            match block {
                Block::Heading(text) => out += &format!("## {}\n", plain(text)),
                Block::Text(text) => out += &format!("{}\n", plain(text)),
                Block::List(items) => items.iter().for_each(|item| out += &format!("- {}\n", plain(item))),
                Block::Table(table) => {
                    let line = |cells: &mut dyn Iterator<Item = &str>| {
                        let cells: Vec<String> = cells.map(|cell| plain(cell).replace('|', "\\|")).collect();
                        format!("| {} |\n", cells.join(" | "))
                    };
                    out += &line(&mut table.columns.iter().map(String::as_str));
                    out += &format!("|---|{}\n", "--:|".repeat(table.columns.len().saturating_sub(1)));
                    table.rows().for_each(|mut row| out += &line(&mut row));
                }
                Block::Plot(plot) => {
                    let (title, x, y) = (plain(&plot.title), plain(&plot.x.label), plain(&plot.y.label));
                    out += &format!("*{title}: {y} over {x}; drawn in the HTML report.*\n");
                }
                Block::Code(code) => {
                    // Longer than any fence within.
                    let longest = code.split(|c| c != '`').map(str::len).max().unwrap_or(0);
                    let fence = "`".repeat(3.max(longest + 1));
                    out += &format!("{fence}\n{}\n{fence}\n", code.trim_end_matches('\n'));
                }
                Block::Notice(text) => out += &format!("> **Note:** {}\n", plain(text)),
            }
        }
        out
    }

    /// One file, without a request to anywhere, light or dark as the reader's system is.
    pub fn html(&self) -> Result<String> {
        let title = escape(&self.title);
        let mut body = format!("<h1>{title}</h1>\n");
        for block in &self.blocks {
            match block {
                Block::Heading(text) => body += &format!("<h2>{}</h2>\n", escape(text)),
                Block::Text(text) => body += &format!("<p>{}</p>\n", escape(text)),
                Block::List(items) => {
                    let items: String = items.iter().map(|item| format!("<li>{}</li>\n", escape(item))).collect();
                    body += &format!("<ul>\n{items}</ul>\n");
                }
                Block::Table(table) => body += &html_table(table),
                Block::Plot(plot) => body += &plot::figure(plot)?,
                Block::Code(code) => body += &format!("<pre>{}</pre>\n", escape(code)),
                Block::Notice(text) => body += &format!("<p class=\"notice\" role=\"note\">{}</p>\n", escape(text)),
            }
        }
        Ok(format!(
            "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" \
             content=\"width=device-width, initial-scale=1\">\n<title>{title}</title>\n<style>\n{STYLE}</style>\n</head>\n\
             <body>\n<main>\n{body}</main>\n</body>\n</html>\n"
        ))
    }
}

fn html_table(table: &Table) -> String {
    let mut out = "<div class=\"wide\"><table>\n<thead><tr>".to_string();
    table.columns.iter().for_each(|name| out += &format!("<th scope=\"col\">{}</th>", escape(name)));
    out += "</tr></thead>\n<tbody>\n";
    for row in table.rows() {
        out += "<tr>";
        for (c, cell) in row.enumerate() {
            let cell = escape(cell);
            out += &if c == 0 { format!("<th scope=\"row\">{cell}</th>") } else { format!("<td>{cell}</td>") };
        }
        out += "</tr>\n";
    }
    out + "</tbody>\n</table></div>\n"
}

/// The plots' black and grey are the text's colour, whatever it is.
const STYLE: &str = "\
:root { color-scheme: light dark; --text: #1b1f24; --back: #ffffff; --line: #d0d7de; --soft: #f3f5f7; --note: #9a6700; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e9ec; --back: #14171a; --line: #3a4149; --soft: #1f2429; --note: #d9a520; }
}
body { margin: 0; color: var(--text); background: var(--back); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1, h2 { line-height: 1.25; }
h2 { margin-top: 2.5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child { text-align: left; }
td { white-space: nowrap; }
tbody th { font-weight: normal; }
pre { padding: .8rem 1rem; overflow-x: auto; background: var(--soft); border-radius: 4px; font-size: 14px; }
.notice { padding: .6rem 1rem; border-left: 4px solid var(--note); background: var(--soft); }
figure { margin: 2rem 0; }
figcaption { margin-bottom: .3rem; }
.legend { display: flex; flex-wrap: wrap; gap: 0 1.2rem; margin: .2rem 0 0 3rem; padding: 0; list-style: none; }
.legend svg { width: 34px; height: 12px; }
svg { max-width: 100%; height: auto; }
svg [fill=\"#000000\"] { fill: var(--text); }
svg [stroke=\"#000000\"] { stroke: var(--text); }
";

/// A plain text on one line of Markdown.
fn plain(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.split_whitespace().collect::<Vec<_>>().join(" ").chars() {
        if matches!(c, '\\' | '`' | '*' | '_' | '[' | ']' | '<' | '~' | '$') {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

/// A plain text within HTML.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            '\'' => out += "&#39;",
            // Others of the kind may not stand in HTML at all.
            c if c.is_control() && !c.is_whitespace() => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// A number rounded to three digits, and the power of ten of the first of them; `None` of 0.
fn three_digits(number: f64) -> Option<(f64, i32)> {
    // Rounded first: 99.96 is 100.
    let rounded: f64 = format!("{number:.2e}").parse().unwrap_or(number);
    (rounded != 0.0).then(|| (rounded, rounded.abs().log10().floor() as i32))
}

/// Three digits, or more of a number of 1000 and above; no suffix and no exponent, e.g. 1234, 12.3, 0.0123.
pub fn digits(number: f64) -> String {
    match three_digits(number) {
        _ if !number.is_finite() => "-".into(),
        None => "0".into(),
        Some((_, exponent)) => format!("{number:.*}", (2 - exponent).max(0) as usize),
    }
}

/// Three digits and a suffix of a thousand's power, e.g. 134k, 8.21T; what is below a thousandth has an exponent.
pub fn compact(number: f64) -> String {
    const SUFFIXES: [&str; 7] = ["", "k", "M", "G", "T", "P", "E"];
    if !number.is_finite() {
        return "–".into();
    }
    let Some((rounded, exponent)) = three_digits(number) else { return "0".into() };
    if !(-3..3 * SUFFIXES.len() as i32).contains(&exponent) {
        return format!("{number:.2e}");
    }
    let power = exponent.div_euclid(3).max(0);
    let scaled = rounded / 1000f64.powi(power);
    let decimals = (2 - (exponent - 3 * power)).max(0) as usize;
    let text = format!("{scaled:.decimals$}");
    let text = if decimals > 0 { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
    format!("{text}{}", SUFFIXES[power as usize])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let points = vec![Point { x: 1.0, y: 2.0, low: Some(1.5), high: Some(2.5) }];
        let blocks = vec![
            Block::Heading("Memory & time".into()),
            Block::Text("a_b*c <b>\nsecond".into()),
            Block::List(vec!["one".into(), "two".into()]),
            Block::Table(Table {
                columns: vec!["what".into(), "a|b".into()],
                rows: vec![vec!["x".into(), "1".into()], vec!["<y>".into()], vec!["z".into(), "2".into(), "3".into()]],
            }),
            Block::Plot(Plot {
                title: "Growth".into(),
                x: Axis { label: "tasks".into(), log: true },
                y: Axis { label: "bytes".into(), log: false },
                series: vec![Series { name: "<script>".into(), points, dashed: true }],
            }),
            Block::Code("```\na < b\n".into()),
            Block::Notice("extrapolated".into()),
        ];
        Report { title: "Cost".into(), blocks }
    }

    #[test]
    fn markdown_shows_texts_as_they_are() {
        let expected = "# Cost\n\n## Memory & time\n\na\\_b\\*c \\<b> second\n\n- one\n- two\n\n\
                        | what | a\\|b |\n|---|--:|\n| x | 1 |\n| \\<y> |  |\n| z | 2 |\n\n\
                        *Growth: bytes over tasks; drawn in the HTML report.*\n\n\
                        ````\n```\na < b\n````\n\n> **Note:** extrapolated\n";
        assert_eq!(report().markdown(), expected);
    }

    #[test]
    fn html_is_escaped_and_needs_nothing_else() {
        let html = report().html().unwrap();
        for part in [
            "<h2>Memory &amp; time</h2>",
            "a_b*c &lt;b&gt;",
            "<th scope=\"row\">&lt;y&gt;</th><td></td></tr>",
            "<title>Growth: bytes over tasks</title>",
            "&lt;script&gt;",
            "<p class=\"notice\" role=\"note\">extrapolated</p>",
            "prefers-color-scheme: dark",
        ] {
            assert!(html.contains(part), "{part} is not in {html}");
        }
        for part in ["<script", "<link", "src=", "href=", "url(", "@import"] {
            assert!(!html.contains(part), "{part} is in {html}");
        }
        assert_eq!(html.matches("<svg").count(), html.matches("</svg>").count());
    }

    #[test]
    fn numbers_have_three_digits() {
        let cases = [
            (0.0, "0"),
            (1.0, "1"),
            (0.25, "0.25"),
            (0.0123456, "0.0123"),
            (12.345, "12.3"),
            (-950.0, "-950"),
            (999.6, "1k"),
            (1234.0, "1.23k"),
            (134_515_008.0, "135M"),
            (8.2e12, "8.2T"),
            (1e21, "1.00e21"),
            (2e-9, "2.00e-9"),
            (f64::NAN, "–"),
        ];
        for (number, text) in cases {
            assert_eq!(compact(number), text);
        }
    }

    #[test]
    fn numbers_without_a_suffix_have_three_digits() {
        let numbers = [1234.5, 99.94, 99.96, 9.994, 9.996, 0.9996, 0.0123456, 0.5, 0.0, f64::NAN];
        let told = ["1234", "99.9", "100", "9.99", "10.0", "1.00", "0.0123", "0.500", "0", "-"];
        assert_eq!(numbers.map(digits), told);
    }
}
