//! The report for people.
//!
//! First what is wrong, then who uses the space, then what was taken and why, then what came of it and what to do next.

use std::io::{self, Write};
use std::time::{Duration, SystemTime};

use super::figures::Usage;
use super::{Mode, Report, Total, human, timestamp};
use crate::advice::{Advice, Place};
use crate::clock::{Next, promised};
use crate::error::count;
use crate::gc::plan::{Item, ItemKind};
use crate::keeper::Kept;
use crate::printable::Printable;

/// How many repositories and problems are shown unless all are asked for.
const SHOWN: usize = 20;
/// How many things a control file lists, where nothing can be asked for.
const FEW: usize = 1000;

/// Clocks of two machines, and the times of a filesystem, differ by so much without anything being wrong.
const CLOCKS_DIFFER: Duration = Duration::from_secs(60);

/// How much is shown.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Details {
    /// Totals, and the repositories with the most garbage.
    Totals,
    /// Everything, a line for each thing.
    Everything,
}

impl Report {
    /// Writes the report for people.
    pub fn write_text(&self, out: &mut dyn Write, place: Place<'_>, details: Details) -> io::Result<()> {
        self.write_notes(out, place)?;
        self.write_problems(out, place, details)?;
        if !matches!(self.kept, Kept::Database(_)) {
            self.write_usage(out, place, details)?;
        }
        if details == Details::Everything {
            self.write_things(out)?;
        }
        self.write_totals(out)?;
        self.write_repairs(out, place, details)?;
        self.write_trash(out)?;
        self.write_outcome(out, place)
    }

    /// What has to be known before anything else is read.
    fn write_notes(&self, out: &mut dyn Write, place: Place<'_>) -> io::Result<()> {
        if let Some(clock) = &self.clock {
            writeln!(out, "note: {clock}\n")?;
        }
        match (&self.refusal, &self.kept) {
            (Some(why), _) if self.mode == Mode::DryRun => {
                writeln!(out, "note: a sweep with the same words would take nothing: {}\n", place.say(why))
            }
            (_, Kept::Harbor(_)) => writeln!(
                out,
                "note: {}: delete there, and let sweeps take what nothing leads to afterwards\n",
                self.kept
            ),
            _ => Ok(()),
        }
    }

    /// Every single thing where they are few: a control file has no word to ask for them.
    pub fn details_for_control_file(&self) -> Details {
        match self.taken().nth(FEW).is_none() && self.plan.young.len() <= FEW {
            true => Details::Everything,
            false => Details::Totals,
        }
    }

    fn write_problems(&self, out: &mut dyn Write, place: Place<'_>, details: Details) -> io::Result<()> {
        let mut problems: Vec<_> = self.problems().collect();
        if problems.is_empty() {
            return Ok(());
        }
        problems.sort_by_key(|(_, held_back)| std::cmp::Reverse(*held_back));
        let shown = if details == Details::Everything { problems.len() } else { SHOWN };
        writeln!(out, "{}:", count(problems.len(), "problem"))?;
        for (problem, held_back) in problems.iter().take(shown) {
            let path = problem.path.printable().to_string();
            match problem.what.contains(&path) {
                true => writeln!(out, "  {}", problem.what)?,
                false => writeln!(out, "  {path}: {}", problem.what)?,
            }
            let held_back = match held_back {
                0 => String::new(),
                bytes => format!("; that holds back {}", human(*bytes)),
            };
            writeln!(out, "    {}{held_back}", problem.effect)?;
        }
        if problems.len() > shown {
            writeln!(out, "  … and {} more; {}", problems.len() - shown, all_shown(place))?;
        }
        writeln!(out)
    }

    /// The repositories, those with the most garbage first.
    fn write_usage(&self, out: &mut dyn Write, place: Place<'_>, details: Details) -> io::Result<()> {
        let mut repositories: Vec<&Usage> = self.figures.repositories.iter().collect();
        let shown_of = |usage: &Usage| self.shown(usage);
        repositories.sort_by_key(|u| std::cmp::Reverse((shown_of(u), u.young_bytes, u.kept_bytes)));
        let shown = if details == Details::Everything { repositories.len() } else { SHOWN };
        let (taken, manifests) = match (self.mode, &self.transaction) {
            (Mode::DryRun, _) if self.takes_all() => ("TO FREE", "MANIFESTS TO TAKE"),
            (Mode::DryRun, _) => ("GARBAGE", "MANIFESTS"),
            (Mode::Sweep, _) if self.refusal.is_some() => ("GARBAGE", "MANIFESTS"),
            (Mode::Sweep, Some(_)) => ("TAKEN", "MANIFESTS TAKEN"),
            (Mode::Sweep, None) => ("FREED", "MANIFESTS TAKEN"),
        };
        let mut rows = vec![row("REPOSITORY", ["KEPT", taken, "YOUNG", manifests].map(String::from))];
        let name = |usage: &Usage| usage.repository.printable().to_string();
        rows.extend(repositories.iter().take(shown).map(|u| usage_row(&name(u), u, shown_of(u))));
        if repositories.len() > shown {
            let rest = repositories.len() - shown;
            rows.push(row(&format!("… and {rest} more; {}", all_shown(place)), Default::default()));
        }
        let unclaimed = &self.figures.unclaimed;
        if unclaimed != &Usage::default() {
            rows.push(usage_row("(no repository)", unclaimed, shown_of(unclaimed)));
        }
        let all = self.all();
        rows.push(usage_row("all, each blob once", &all, (all.taken_bytes, all.manifests_taken)));
        write_table(out, &rows)?;
        writeln!(out)
    }

    /// The bytes and manifests of a repository that a table shows: what was taken, or the garbage where not all of that
    /// goes at once.
    fn shown(&self, usage: &Usage) -> (u64, usize) {
        match self.mode == Mode::DryRun || self.refusal.is_some() {
            true => (usage.garbage_bytes, usage.garbage_manifests),
            false => (usage.taken_bytes, usage.manifests_taken),
        }
    }

    /// What a table and the totals are about; see [`Report::shown`].
    pub(super) fn listed(&self) -> Box<dyn Iterator<Item = &Item> + '_> {
        match self.mode == Mode::Sweep && self.refusal.is_some() {
            true => Box::new(self.plan.items.iter()),
            false => self.garbage(),
        }
    }

    /// What the whole store holds, each blob once.
    fn all(&self) -> Usage {
        let is_manifest = |item: &&Item| item.kind() == ItemKind::Revision;
        let young = self.garbage.as_ref().unwrap_or(&self.plan).young.iter();
        Usage {
            kept_bytes: self.figures.kept_bytes,
            taken_bytes: self.listed().map(|i| i.bytes).sum(),
            young_bytes: young.map(|y| y.bytes).sum(),
            manifests_taken: self.listed().filter(is_manifest).count(),
            ..Usage::default()
        }
    }

    /// A line for each thing: what, which, bytes, why.
    fn write_things(&self, out: &mut dyn Write) -> io::Result<()> {
        let tables = &self.catalog.tables;
        for item in self.listed() {
            let bytes = if item.bytes > 0 { format!(" {}", human(item.bytes)) } else { String::new() };
            let noun = item.kind().noun().replace(' ', "-");
            match (item.kind(), item.digest()) {
                (ItemKind::Blob, Some(id)) => write!(out, "{noun} {}", tables.digests.get(id))?,
                _ => write!(out, "{noun} {}", item.path(tables).printable())?,
            }
            writeln!(out, "{bytes}: {}", item.reason)?;
        }
        for young in &self.plan.young {
            let (digest, bytes) = (tables.digests.get(young.digest), human(young.bytes));
            let when = match young.eligible {
                Next::At(_) => format!("may be taken from {} on", young.eligible),
                Next::Due => "may be taken by the next run".to_string(),
                Next::Open => "waits for the registry".to_string(),
            };
            writeln!(out, "young {digest} {bytes}: no manifest names it; {when}")?;
        }
        if self.listed().next().is_some() || !self.plan.young.is_empty() {
            writeln!(out)?;
        }
        Ok(())
    }

    fn write_totals(&self, out: &mut dyn Write) -> io::Result<()> {
        let totals = Report::totals_by_reason(self.listed());
        let rows: Vec<[String; 3]> = totals
            .iter()
            .map(|(kind, reason, Total { count: number, bytes })| {
                let bytes = if *bytes == 0 { "-".to_string() } else { human(*bytes) };
                [count(*number, kind.noun()), bytes, reason.to_string()]
            })
            .collect();
        let width = |at: usize| rows.iter().map(|row| row[at].chars().count()).max().unwrap_or(0);
        let (first, second) = (width(0), width(1));
        for [what, bytes, why] in &rows {
            writeln!(out, "{what:<first$}  {bytes:>second$}  {why}")?;
        }
        if !rows.is_empty() {
            writeln!(out)?;
        }
        Ok(())
    }

    /// What is broken and can be made whole, or was.
    fn write_repairs(&self, out: &mut dyn Write, place: Place<'_>, details: Details) -> io::Result<()> {
        let shown = if details == Details::Everything { usize::MAX } else { SHOWN };
        for (repair, is_done) in self.repairs().take(shown) {
            let word = if is_done { "repaired" } else { "can be repaired" };
            writeln!(out, "{word}: {}: {}", repair.path.printable(), repair.fix)?;
        }
        let broken = self.repairs().filter(|(_, is_done)| !is_done).count();
        match broken {
            0 => Ok(()),
            _ => writeln!(
                out,
                "{}\n",
                place.say(&format!(
                    "{} can be made whole: {}",
                    count(broken, "broken or missing link"),
                    Advice::Repair
                ))
            ),
        }
    }

    fn write_trash(&self, out: &mut dyn Write) -> io::Result<()> {
        let is_foreseen = self.mode == Mode::DryRun;
        let (back, dropped, purged) = match is_foreseen {
            false => ("given back", "dropped", "purged"),
            true => ("would be given back", "would drop", "would purge"),
        };
        for path in &self.restored {
            writeln!(out, "{back}: {} is in use again", path.printable())?;
        }
        let gone = if is_foreseen { "would be gone" } else { "are gone now" };
        for id in &self.dropped_transactions {
            writeln!(out, "{dropped} {} from the trash: its undo needs bytes that {gone}", id.printable())?;
        }
        for id in &self.purged_transactions {
            writeln!(out, "{purged} {}: the trash kept it long enough", id.printable())?;
        }
        Ok(())
    }

    fn write_outcome(&self, out: &mut dyn Write, place: Place<'_>) -> io::Result<()> {
        for failure in &self.failures {
            writeln!(out, "failed: {}", place.say(&failure.printable().to_string()))?;
        }
        let catalog = &self.catalog;
        writeln!(
            out,
            "looked at {}, {}, {}",
            count(catalog.repositories.len(), "repository"),
            count(catalog.manifests.len(), "manifest"),
            count(catalog.blobs.len(), "blob"),
        )?;
        self.write_steps(out, place)?;
        self.write_young_manifests(out)?;
        if !self.plan.is_thorough && !matches!(self.kept, Kept::Database(_)) {
            let thorough = place.say("{+thorough}");
            writeln!(out, "{thorough} looks for leftovers in directories that are in use, too")?;
        }
        writeln!(out, "{}", self.outcome())?;
        match self.held_back().filter(|_| self.mode == Mode::Sweep) {
            Some(why) => writeln!(out, "{}", place.say(&why))?,
            None if self.mode == Mode::Sweep && self.freed_bytes > 0 => {
                writeln!(out, "freed {} in all", human(self.freed_bytes))?;
            }
            None => {}
        }
        self.write_next(out, place)
    }

    /// What is garbage and stays for now; beside a registry, where it stands.
    fn write_steps(&self, out: &mut dyn Write, place: Place<'_>) -> io::Result<()> {
        if self.options.gate.is_beside() && !matches!(self.kept, Kept::Database(_)) {
            let gate = &self.options.gate;
            writeln!(out, "registry: {}", place.say(&gate.to_string()))?;
            for total in &self.states {
                writeln!(out, "{}", place.say(&total.text(gate)))?;
            }
            if self.mode == Mode::DryRun && self.states.is_empty() {
                return Ok(());
            }
            if self.mode == Mode::DryRun {
                let [grace, drain, keep] =
                    [self.options.grace, self.options.drain, self.options.keep].map(age);
                writeln!(
                    out,
                    "beside it a sweep goes in steps, a run for each: seen unused for {grace}, fenced for {drain}, in the \
                     trash for {keep}"
                )?;
            }
            return self.write_future(out);
        }
        if self.mode == Mode::Sweep && !self.options.gate.is_beside() {
            write!(out, "registry: {}", place.say(&self.options.gate.to_string()))?;
            match self.options.gate.has_witness() && self.is_complete() {
                true => writeln!(out, ", nothing written since {}", timestamp(self.started_at))?,
                false => writeln!(out)?,
            }
        }
        if let Some(next) = self.plan.young.iter().filter_map(|y| y.eligible.time()).min() {
            writeln!(
                out,
                "left {} ({}) younger than the grace period of {}; the next may be taken from {}",
                count(self.plan.young.len(), "unreferenced blob"),
                human(self.plan.young.iter().map(|y| y.bytes).sum()),
                age(self.options.grace),
                promised(next),
            )?;
        }
        self.write_future(out)
    }

    /// Garbage that its times make younger than it can be.
    fn write_future(&self, out: &mut dyn Write) -> io::Result<()> {
        let blobs = self.plan.young.iter().filter_map(|young| young.last_used);
        let age = self.options.grace.max(self.options.untagged_for);
        let manifests = self.plan.young_manifests.iter().filter_map(|y| y.eligible_at?.checked_sub(age));
        let is_in_future = |last_used: &SystemTime| *last_used > self.started_at + CLOCKS_DIFFER;
        let times: Vec<SystemTime> = blobs.chain(manifests).filter(is_in_future).collect();
        match times.iter().max() {
            None => Ok(()),
            Some(last) => writeln!(
                out,
                "{} of the young ones {} in the future, up to {}: a clock was wrong, or is wrong now. Until then they count as young",
                times.len(),
                if times.len() == 1 { "has a time" } else { "have times" },
                timestamp(*last)
            ),
        }
    }

    /// Manifests that no tag leads to and that are too young.
    fn write_young_manifests(&self, out: &mut dyn Write) -> io::Result<()> {
        let young = &self.plan.young_manifests;
        if young.is_empty() {
            return Ok(());
        }
        let age = age(self.options.grace.max(self.options.untagged_for));
        let next = young.iter().filter_map(|manifest| manifest.eligible_at).min();
        let from =
            next.map_or_else(String::new, |next| format!("; the next may be taken from {}", promised(next)));
        writeln!(out, "left {} younger than {age} (grace){from}", count(young.len(), "untagged manifest"))
    }

    /// What to do next.
    fn write_next(&self, out: &mut dyn Write, place: Place<'_>) -> io::Result<()> {
        if self.is_stopped {
            writeln!(out, "stopped before the end; run it again for the rest")?;
        }
        if !self.is_complete() {
            let failures = count(self.failures.len(), "failure");
            writeln!(out, "not finished: {failures}; run it again when that is mended")?;
        }
        let would_act = self.taken().next().is_some() || self.fenced.count > 0;
        match (self.mode, &self.transaction) {
            (Mode::DryRun, _) if would_act => {
                let sweep = match place {
                    Place::CommandLine(_) => "run this without --dry-run",
                    Place::ControlFile => "write sweep instead of dry-run",
                };
                writeln!(out, "next: {sweep} to move it to the trash")
            }
            (Mode::Sweep, Some(id)) => self.write_next_of(out, place, id),
            _ => Ok(()),
        }
    }

    /// What to do about a transaction that was taken.
    fn write_next_of(&self, out: &mut dyn Write, place: Place<'_>, id: &str) -> io::Result<()> {
        let (purge, undo) = (Advice::Purge(id.to_string()).at(place), Advice::Undo(id.to_string()).at(place));
        if self.options.gate.is_beside() {
            match self.next_step() {
                Some(wait) => {
                    let at = timestamp(self.finished_at + wait + Duration::from_secs(1));
                    writeln!(
                        out,
                        "next: the step after this is due at {at}; the first run after that takes it"
                    )?;
                }
                None => writeln!(out, "next: later runs go on")?,
            }
            return writeln!(out, "      {undo}  brings back what was taken");
        }
        let width = purge.len().max(undo.len());
        let keep = age(self.options.keep);
        writeln!(out, "next: {purge:<width$}  frees the space; a run after {keep} does it, too")?;
        writeln!(out, "      {undo:<width$}  brings it back")
    }
}

/// How to see all of what is cut short.
fn all_shown(place: Place<'_>) -> &'static str {
    match place {
        Place::CommandLine(_) => "--verbose shows all",
        Place::ControlFile => "regfs gc --dry-run --verbose shows all",
    }
}

/// A duration as it is typed: `24h`, `7d`.
pub(in crate::gc) fn age(duration: Duration) -> String {
    const HOUR: u64 = 3600;
    match (duration.as_secs(), duration.subsec_nanos()) {
        (0, _) | (_, 1..) => humantime::format_duration(duration).to_string(),
        (seconds, _) if seconds % (24 * HOUR) == 0 && seconds > 48 * HOUR => {
            format!("{}d", seconds / 24 / HOUR)
        }
        (seconds, _) if seconds % HOUR == 0 => format!("{}h", seconds / HOUR),
        _ => humantime::format_duration(duration).to_string(),
    }
}

/// What a cell says where there is nothing.
const NOTHING: &str = "-";

fn usage_row(name: &str, usage: &Usage, (shown, manifests): (u64, usize)) -> Row {
    let bytes = |number: u64| if number == 0 { NOTHING.to_string() } else { human(number) };
    let [kept, taken, young] = [usage.kept_bytes, shown, usage.young_bytes].map(bytes);
    let manifests = match manifests {
        0 => NOTHING.to_string(),
        number => number.to_string(),
    };
    row(name, [kept, taken, young, manifests])
}

/// A name and four numbers.
type Row = [String; 5];

fn row(name: &str, [a, b, c, d]: [String; 4]) -> Row {
    [name.to_string(), a, b, c, d]
}

/// Columns as wide as they need, numbers to the right; those without any number are left out.
fn write_table(out: &mut dyn Write, rows: &[Row]) -> io::Result<()> {
    let (_, below) = rows.split_at(rows.len().min(1));
    let width = |at: usize| rows.iter().map(|row| row[at].chars().count()).max().unwrap_or(0);
    let is_used = |at: &usize| below.iter().any(|row| !row[*at].is_empty() && row[*at] != NOTHING);
    let columns: Vec<(usize, usize)> = (1..5).filter(is_used).map(|at| (at, width(at))).collect();
    let first = width(0);
    for row in rows {
        let mut line = format!("{:<first$}", row[0]);
        for (at, width) in &columns {
            line += &format!("  {:>width$}", row[*at]);
        }
        writeln!(out, "{}", line.trim_end())?;
    }
    Ok(())
}
