//! `loramux bench methods`: its command line to what is measured.

use clap::ValueEnum;

use super::args::BenchMethodsArgs;
use crate::hosting::methods::{self, Kind, Method, Options, Recipe, Size};
use crate::{Error, Result};

pub async fn bench(args: BenchMethodsArgs) -> Result<()> {
    methods::bench(options(args)?).await
}

fn options(args: BenchMethodsArgs) -> Result<Options> {
    let quick = |short: usize, long: usize| if args.quick { short } else { long };
    let recipe = Recipe {
        epochs: args.epochs.or((args.quick && args.shown.is_none()).then_some(2)),
        shown: args.shown.unwrap_or(600),
        batch_size: args.batch_size,
        max_length: args.max_length.unwrap_or(quick(32, 128)),
        evaluations: args.evaluations.unwrap_or(quick(2, 4)),
        held_out: args.held_out.unwrap_or(quick(40, 500)),
        jobs: args.jobs,
        more: args.more,
    };
    let sizes = match (args.sizes.is_empty(), args.quick) {
        (false, _) => args.sizes,
        (true, true) => vec![Size::Some(16), Size::Some(32)],
        (true, false) => vec![Size::Some(50), Size::Some(200), Size::Some(1000), Size::All],
    };
    let mut methods: Vec<Method> = Vec::new();
    for kind in args.methods {
        if methods.iter().all(|method| method.kind != kind) {
            methods.push(Method { kind, more: vec![] });
        }
    }
    for option in &args.options {
        let (kind, more) = method_options(option)?;
        let method = methods.iter_mut().find(|method| method.kind == kind);
        let method = method.ok_or_else(|| Error::bad_request(format!("--options {option}: it is not in --methods")))?;
        method.more.extend(more);
    }
    let trainer = match args.trainer {
        Some(path) => path,
        None => std::env::current_exe()?.with_file_name(format!("loramux-train{}", std::env::consts::EXE_SUFFIX)),
    };
    if !trainer.exists() {
        return Err(Error::bad_request(format!("{} is not there; name the trainer with --trainer", trainer.display())));
    }
    Ok(Options {
        out: args.out,
        tasks: args.tasks,
        methods,
        sizes,
        seeds: args.seeds.unwrap_or(if args.quick { 2 } else { 3 }),
        trainer,
        model: args.model,
        recipe,
        target: args.target,
    })
}

/// `lora=--rank 16` as its parts.
fn method_options(option: &str) -> Result<(Kind, Vec<String>)> {
    let wrong = || Error::bad_request(format!("--options {option}: expected METHOD=OPTIONS, e.g. \"lora=--rank 16\""));
    let (name, more) = option.split_once('=').ok_or_else(wrong)?;
    let kind = Kind::from_str(name, false).map_err(|_| wrong())?;
    Ok((kind, more.split_whitespace().map(str::to_string).collect()))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::super::args::{BenchCommand, Cli, Command};
    use super::*;

    fn parse(more: &[&str]) -> Result<Options> {
        let exe = std::env::current_exe().unwrap();
        let always = ["loramux", "bench", "methods", "--task", "a=x.csv", "--trainer", exe.to_str().unwrap()];
        let cli = Cli::try_parse_from(always.iter().chain(more)).map_err(Error::bad_request)?;
        let Command::Bench(BenchCommand::Methods(args)) = cli.command else { panic!("another command") };
        options(args)
    }

    #[test]
    fn options_are_read() {
        let usual = parse(&[]).unwrap();
        assert_eq!((usual.methods.len(), usual.sizes.len(), usual.seeds, usual.recipe.shown), (4, 4, 3, 600));
        let quick = parse(&["--quick", "--sizes", "9,all"]).unwrap();
        assert_eq!((quick.sizes, quick.seeds), (vec![Size::Some(9), Size::All], 2));
        assert_eq!((quick.recipe.epochs, quick.recipe.held_out), (Some(2), 40));
        assert_eq!(parse(&["--quick", "--shown", "90"]).unwrap().recipe.epochs, None);
        let own = ["--methods", "full,lora,lora", "--options", "lora=--rank 16 --dora", "--", "--threads", "2"];
        let own = parse(&own).unwrap();
        assert_eq!(own.recipe.more, ["--threads", "2"]);
        let lora = Method { kind: Kind::Lora, more: ["--rank", "16", "--dora"].map(Into::into).into() };
        assert_eq!(own.methods, [Method { kind: Kind::Full, more: vec![] }, lora]);
        for wrong in [
            &["--options", "lora"][..],
            &["--options", "qlora=--rank 1"],
            &["--methods", "full", "--options", "lora=--rank 1"],
            &["--sizes", "few"],
            &["--trainer", "/nowhere"],
        ] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }
}
