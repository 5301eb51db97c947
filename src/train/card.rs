//! What a person reads about a trained adapter or model: its card, and a plot of its curves.

use plotters::prelude::*;

use super::examples::Example;
use super::metrics::Confusion;
use super::trainer::{Evaluation, History};
use crate::{Error, Result};

/// What the card tells beside the history.
pub struct Card<'a> {
    pub name: &'a str,
    /// `None` for a model that was made from nothing.
    pub base: Option<&'a str>,
    pub adapter: bool,
    /// Options as they were given, in order.
    pub settings: Vec<(&'a str, String)>,
    /// The data's files and what was made of them.
    pub data: Vec<String>,
    pub labels: Option<&'a [String]>,
    pub trained: usize,
    pub parameters: usize,
}

/// Numbers of an evaluation, for people.
pub fn describe(evaluation: &Evaluation) -> String {
    match &evaluation.confusion {
        Some(c) => format!("accuracy {:.4}, macro-F1 {:.4}, loss {:.4}", c.accuracy(), c.macro_f1(), evaluation.loss),
        None => format!("perplexity {:.3}, loss {:.4}", evaluation.loss.exp(), evaluation.loss),
    }
}

/// The confusion matrix as a table in Markdown: a row a true class, a column an answer.
pub fn confusion_table(labels: &[String], confusion: &Confusion) -> String {
    let cell = |s: &str| s.replace('|', "\\|");
    let mut out =
        format!("| true \\ answered | {} |\n", labels.iter().map(|l| cell(l)).collect::<Vec<_>>().join(" | "));
    out += &format!("|---|{}\n", "---|".repeat(labels.len()));
    for (label, row) in labels.iter().zip(&confusion.0) {
        let counts: Vec<String> = row.iter().map(usize::to_string).collect();
        out += &format!("| {} | {} |\n", cell(label), counts.join(" | "));
    }
    out
}

impl Card<'_> {
    pub fn markdown(&self, history: &History) -> String {
        let mut out = "---\n".to_string();
        if let Some(base) = self.base {
            out += &format!("base_model: {base}\n");
        }
        out += if self.adapter { "library_name: peft\n" } else { "library_name: transformers\n" };
        let share = 100.0 * self.trained as f64 / self.parameters.max(1) as f64;
        let begun = self.base.map_or("from nothing".into(), |base| format!("on {base}"));
        out += &format!("---\n\n# {}\n\nTrained by `loramux-train` {begun}. ", self.name);
        out += &format!("{} of {} parameters are trained ({share:.2} %).\n\n", self.trained, self.parameters);
        out += "## Data\n\n";
        self.data.iter().for_each(|line| out += &format!("- {line}\n"));
        out += "\n## Result\n\n";
        match history.best.map(|b| &history.evaluations[b]) {
            None => out += "Nothing was held out, so nothing is known of how good it is.\n",
            Some(best) => {
                out += &format!("On the examples held out, after {} steps: {}.\n", best.step, describe(best));
                if let (Some(labels), Some(confusion)) = (self.labels, &best.confusion) {
                    out += &format!("\n{}", confusion_table(labels, confusion));
                }
                out += "\n![Curves](curves.svg)\n\n| step | evaluation |\n|---|---|\n";
                history.evaluations.iter().for_each(|e| out += &format!("| {} | {} |\n", e.step, describe(e)));
            }
        }
        let rate = history.tokens as f64 / history.seconds.max(1e-9);
        out += &format!(
            "\n## Training\n\n{} steps over {} tokens in {:.0} s ({rate:.0} tokens/s).\n\n| option | value |\n|---|---|\n",
            history.step, history.tokens, history.seconds
        );
        self.settings.iter().for_each(|(name, value)| out += &format!("| {name} | {} |\n", value.replace('|', "\\|")));
        out
    }
}

/// The losses and evaluations over the steps, as SVG.
pub fn curves(history: &History) -> Result<String> {
    let mut svg = String::new();
    draw(history, &mut svg).map_err(|e| Error::internal(format!("the curves could not be drawn: {e}")))?;
    Ok(svg)
}

fn draw(history: &History, svg: &mut String) -> Result<(), Box<dyn std::error::Error>> {
    // The mean over a window shows where noisy single losses go.
    let window = (history.losses.len() / 50).max(1);
    let mean = |w: &[f32]| w.iter().sum::<f32>() as f64 / w.len() as f64;
    let smooth: Vec<(f64, f64)> =
        history.losses.windows(window).enumerate().map(|(i, w)| ((i + window) as f64, mean(w))).collect();
    let evaluated: Vec<(f64, f64)> = history.evaluations.iter().map(|e| (e.step as f64, e.loss)).collect();
    let top = smooth.iter().chain(&evaluated).map(|p| p.1).fold(0.0, f64::max) * 1.05 + 1e-6;
    let root = SVGBackend::with_string(svg, (720, 360)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(48)
        .build_cartesian_2d(0.0..history.step.max(1) as f64, 0.0..top)?;
    chart.configure_mesh().x_desc("step").y_desc("loss").light_line_style(WHITE).draw()?;
    let training = chart.draw_series(LineSeries::new(smooth, &BLUE))?;
    training.label("training").legend(|(x, y)| PathElement::new([(x, y), (x + 16, y)], BLUE));
    let held_out = chart.draw_series(LineSeries::new(evaluated.clone(), &RED))?;
    held_out.label("held out").legend(|(x, y)| PathElement::new([(x, y), (x + 16, y)], RED));
    chart.draw_series(evaluated.iter().map(|&point| Circle::new(point, 3, RED.filled())))?;
    chart.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK).draw()?;
    root.present()?;
    drop(chart);
    drop(root);
    Ok(())
}

/// How many examples and tokens there are, for people.
pub fn count(examples: &[Example]) -> String {
    let tokens: usize = examples.iter().map(|e| e.tokens.len()).sum();
    format!("{} examples, {tokens} tokens", examples.len())
}
