//! An answer as text and as JSON.

use std::borrow::Cow;
use std::io::{self, Write};
use std::path::PathBuf;

use serde_json::{Value, json};

use super::chains::reference;
use super::report::{age, human, timestamp};
use super::{Chain, Garbage, Link, Root, Step, Why};
use crate::advice::{Advice, Place};
use crate::error::count;
use crate::printable::Printable;

impl Why {
    /// Writes the answer for people.
    pub fn write_text(&self, out: &mut dyn Write, place: Place<'_>) -> io::Result<()> {
        self.write_thing(out)?;
        for obstacle in &self.obstacles {
            writeln!(out, "no collection runs before this is mended: {}", obstacle.printable())?;
        }
        match &self.garbage {
            Some(garbage) => self.write_garbage(out, garbage)?,
            None if self.is_kept => self.write_chains(out, place)?,
            None => writeln!(out, "nothing leads to it")?,
        }
        self.write_trash(out)?;
        self.write_next(out, place)
    }

    /// The answer for people.
    pub fn text(&self, place: Place<'_>) -> String {
        let mut text = Vec::new();
        // Writing to memory can't fail.
        let _ = self.write_text(&mut text, place);
        String::from_utf8_lossy(&text).into_owned()
    }

    fn write_thing(&self, out: &mut dyn Write) -> io::Result<()> {
        let article = if self.kind == "index" { "an" } else { "a" };
        write!(out, "{} is {article} {}", self.digest, self.kind)?;
        if let Some(media_type) = &self.media_type {
            write!(out, " ({})", media_type.printable())?;
        }
        if let Some(bytes) = self.bytes {
            write!(out, ", {}", human(bytes))?;
        }
        match self.is_present {
            true => write!(out, ", in the store")?,
            false => write!(out, ", missing in the store")?,
        }
        match &self.stored_as {
            Some(digest) => writeln!(out, " (stored as {digest})"),
            None => writeln!(out),
        }
    }

    fn write_chains(&self, out: &mut dyn Write, place: Place<'_>) -> io::Result<()> {
        match self.chains_found {
            1 => writeln!(out, "1 chain of references keeps it:")?,
            many => writeln!(out, "{many} chains of references keep it:")?,
        }
        for chain in &self.chains {
            writeln!(out)?;
            write_chain(out, chain)?;
        }
        if let Some(more) = self.chains_found.checked_sub(self.chains.len()).filter(|more| *more > 0) {
            let all = match place {
                Place::CommandLine(_) => "--all shows them".to_string(),
                Place::ControlFile => format!("`regfs why STORE {} --all` shows them", self.digest),
            };
            writeln!(out, "\nand {more} more; {all}")?;
        }
        if self.is_untagged {
            let option = match place {
                Place::CommandLine(_) => "--untagged",
                Place::ControlFile => "the word untagged",
            };
            writeln!(
                out,
                "\nno tag leads to it: a sweep with {option} takes it, once it is older than the grace period"
            )?;
        }
        Ok(())
    }

    fn write_garbage(&self, out: &mut dyn Write, garbage: &Garbage) -> io::Result<()> {
        writeln!(out, "nothing leads to it: {}", garbage.reason)?;
        if self.referrers > 0 {
            writeln!(out, "{} about it would not keep it", count(self.referrers, "manifest"))?;
        }
        if let (Some(used), Some(eligible)) = (garbage.last_used, garbage.eligible_at) {
            let grace = age(self.grace);
            let (used, eligible) = (timestamp(used), timestamp(eligible));
            match garbage.is_eligible {
                true => {
                    writeln!(out, "last used {used}; a sweep may take it since {eligible} (grace {grace})")?
                }
                false => {
                    writeln!(out, "last used {used}; a sweep may take it from {eligible} on (grace {grace})")?
                }
            }
        }
        for repository in &garbage.links {
            writeln!(out, "layer link in {}: goes along with it", repository.printable())?;
        }
        Ok(())
    }

    fn write_trash(&self, out: &mut dyn Write) -> io::Result<()> {
        for trashed in &self.trash {
            let names = |list: &[PathBuf]| {
                list.iter().map(|name| name.printable().to_string()).collect::<Vec<_>>().join(", ")
            };
            let mut parts: Vec<String> = Vec::new();
            parts.extend(trashed.has_bytes.then(|| "its bytes".to_string()));
            if !trashed.revisions.is_empty() {
                parts.push(format!("the manifest of {}", names(&trashed.revisions)));
            }
            if !trashed.links.is_empty() {
                parts.push(format!("the layer link of {}", names(&trashed.links)));
            }
            writeln!(out, "in the trash: {} lies in {}", parts.join(", "), trashed.id.printable())?;
        }
        Ok(())
    }

    fn write_next(&self, out: &mut dyn Write, place: Place<'_>) -> io::Result<()> {
        if self.is_kept && self.is_present {
            return Ok(());
        }
        if let Some(trashed) = self.best_undo() {
            return writeln!(out, "next: {}  brings it back", Advice::Undo(trashed.id.clone()).at(place));
        }
        match self.garbage.is_some() {
            true => writeln!(out, "next: {}  shows what a sweep would take", Advice::DryRun.at(place)),
            false => Ok(()),
        }
    }

    /// The answer for programs.
    pub fn json(&self) -> Value {
        json!({
            "digest": self.digest,
            "kind": self.kind,
            "media_type": self.media_type,
            "bytes": self.bytes,
            "present": self.is_present,
            "stored_as": self.stored_as,
            "kept": self.is_kept,
            "untagged": self.is_untagged,
            "chains_found": self.chains_found,
            "chains": self.chains.iter().map(chain_json).collect::<Vec<_>>(),
            "garbage": self.garbage.as_ref().map(|garbage| json!({
                "reason": garbage.reason.to_string(),
                "last_used": garbage.last_used.map(timestamp),
                "eligible_at": garbage.eligible_at.map(timestamp),
                "eligible": garbage.is_eligible,
                "layer_links": exact(&garbage.links),
            })),
            "trash": self.trash.iter().map(|trashed| json!({
                "id": trashed.id,
                "bytes": trashed.has_bytes,
                "manifest_of": exact(&trashed.revisions),
                "layer_links": exact(&trashed.links),
            })).collect::<Vec<_>>(),
            "obstacles": self.obstacles,
        })
    }
}

fn write_chain(out: &mut dyn Write, chain: &Chain) -> io::Result<()> {
    let pushed =
        |time: &Option<_>| time.map_or(String::new(), |time| format!(", pushed {}", timestamp(time)));
    let what = match &chain.root {
        Root::Tag { pushed: time, is_served: true, .. } => format!("tag{}", pushed(time)),
        Root::Tag { pushed: time, is_served: false, .. } => {
            format!("tag whose manifest is not in the repository{}", pushed(time))
        }
        Root::Untagged { pushed: time } => format!("untagged{}", pushed(time)),
        Root::Held => "kept for a tag or a signature that no registry serves".to_string(),
        Root::Kept => "kept because something in the repository can't be judged".to_string(),
    };
    writeln!(out, "{} ({what})", reference(chain))?;
    for problem in &chain.problems {
        writeln!(out, "  because {}", problem.printable())?;
    }
    chain.steps.iter().try_for_each(|step| write_step(out, step))
}

fn write_step(out: &mut dyn Write, step: &Step) -> io::Result<()> {
    write!(out, "  → {} {}", step.kind, step.digest)?;
    if let Some(platform) = &step.platform {
        write!(out, " ({})", platform.printable())?;
    }
    writeln!(
        out,
        "{}",
        match step.link {
            Some(Link::Referrer) => ", which is about the one above",
            Some(Link::StoredAs) => ", which the one above is stored as",
            Some(Link::ServedAs) => ", which the repository serves instead",
            Some(Link::Names) | None => "",
        }
    )
}

/// Names for programs; what is no UTF-8 can't stand in JSON.
fn exact(names: &[PathBuf]) -> Vec<Cow<'_, str>> {
    names.iter().map(|name| name.to_string_lossy()).collect()
}

fn chain_json(chain: &Chain) -> Value {
    let (root, tag, pushed) = match &chain.root {
        Root::Tag { name, pushed, is_served: true } => ("tag", Some(name), *pushed),
        Root::Tag { name, pushed, is_served: false } => ("dangling-tag", Some(name), *pushed),
        Root::Untagged { pushed } => ("untagged", None, *pushed),
        Root::Held => ("held", None, None),
        Root::Kept => ("problem", None, None),
    };
    let link = |link: Link| match link {
        Link::Names => "names",
        Link::Referrer => "referrer",
        Link::StoredAs => "stored-as",
        Link::ServedAs => "served-as",
    };
    let step = |step: &Step| {
        json!({
            "link": step.link.map(link),
            "digest": step.digest,
            "kind": step.kind,
            "platform": step.platform,
        })
    };
    json!({
        "repository": chain.repository.to_string_lossy(),
        "root": root,
        "tag": tag,
        "pushed": pushed.map(timestamp),
        "problems": chain.problems,
        "steps": chain.steps.iter().map(step).collect::<Vec<_>>(),
    })
}
