//! Brake: a rule that would remove most of a registry's manifests was hardly meant like that.
//!
//! Rules that go by tags (untagged manifests, referrers of what is gone) do what they say, also where all tags were lost, or
//! where they are kept elsewhere. So a plan that removes more than half of all manifests, and not just a few, is carried out
//! only when that is asked for.

use super::plan::{ItemKind, Plan};
use crate::catalog::Catalog;

/// Fewer are never too many: small registries change as a whole.
const FEW: usize = 20;

/// How much of a registry a plan removes. A manifest counts in each repository that has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Manifests that go.
    pub going: usize,
    /// Manifests there are.
    pub all: usize,
}

impl Extent {
    /// That of a plan. What a plan is to remove by any rule counts; nobody needs to name the rules here.
    pub fn of(plan: &Plan, catalog: &Catalog) -> Extent {
        let going = plan.items.iter().filter(|item| item.kind() == ItemKind::Revision).count();
        let all = catalog.repositories.values().map(|repository| repository.revisions.len()).sum();
        Extent { going, all }
    }

    /// Why it is not removed, with what to do.
    pub fn refusal(&self) -> String {
        let Extent { going, all } = self;
        format!(
            "this would remove {going} of {all} manifests, more than half of them, so nothing was taken. Look at the report; \
             if that is what you want, add {{+allow-large}}"
        )
    }

    /// Whether that is more than anybody is likely to want.
    pub fn is_large(&self) -> bool {
        self.going >= FEW && self.going > self.all / 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_than_half_of_all_and_not_just_a_few_is_large() {
        let cases = [
            (0, 0, false),
            (19, 19, false),
            (19, 21, false),
            (20, 20, true),
            (20, 39, true),
            (20, 40, false),
            (21, 40, true),
            (21, 41, true),
            (21, 42, false),
            (500, 1_000, false),
            (501, 1_000, true),
        ];
        for (going, all, is_large) in cases {
            assert_eq!(Extent { going, all }.is_large(), is_large, "{going} of {all}");
        }
    }
}
