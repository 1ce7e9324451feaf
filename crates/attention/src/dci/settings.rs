//! Settings of method `dci`.

use std::fmt;

/// Settings of the multi-level Prioritized DCI search; [`DciSettings::PUBLISHED`] (also the default) holds those that
/// IceFormer was published with; of `whole_range` alone the publication knows nothing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DciSettings {
    /// Keys that the softmax of a query is taken over: those with the largest logits found. At least 1.
    pub kept_keys: usize,
    /// Levels of the tree of keys, 1 to 8. A key climbs a level with probability `keys^(−1/levels)`; 1 means no tree.
    pub levels: usize,
    /// Simple indices (random directions) of a composite index, 1 to 64: *m*.
    pub simple_indices: usize,
    /// Composite indices, 1 to 64: *L*.
    pub composite_indices: usize,
    /// Nodes that the search for a key's parent follows at each level, at least 1.
    pub build_beam: usize,
    /// Share of a large node's keys that each composite index retrieves in the search for a key's parent, above 0 up to
    /// 1; `build_beam` keys at least.
    pub build_share: f32,
    /// Nodes that a query follows at each level, at least 1; `None`: as many as it keeps keys. Widened where it finds
    /// fewer keys than are to be kept.
    pub query_beam: Option<usize>,
    /// Share of a large node's keys that each composite index retrieves for a query, above 0 up to 1; the beam or the
    /// keys kept, whichever is more, at least.
    pub query_share: f32,
    /// Nodes of up to this many keys are evaluated whole.
    pub whole_node: usize,
    /// A query that sees up to this many keys is compared with all of them. By default no more than leave the keys evaluated
    /// for a prompt of 1,024 tokens as few as the published code evaluates; a search takes longer.
    pub whole_range: usize,
    /// Seed of the random directions and of the levels that keys climb to.
    pub seed: u64,
}

impl DciSettings {
    /// The settings that IceFormer was published with.
    pub const PUBLISHED: Self = Self {
        kept_keys: 20,
        levels: 3,
        simple_indices: 4,
        composite_indices: 2,
        build_beam: 5,
        build_share: 0.002,
        query_beam: None,
        query_share: 0.8,
        whole_node: 128,
        whole_range: 640,
        seed: 0,
    };

    /// Checks every field.
    ///
    /// # Errors
    /// The first field out of its range.
    pub fn validate(&self) -> Result<(), DciSettingsError> {
        let count = |field, value: usize, most: usize| match (1..=most).contains(&value) {
            true => Ok(()),
            false => Err(DciSettingsError { field, value: value.to_string(), expected: Expected::Count(most) }),
        };
        let share = |field, value: f32| match value > 0.0 && value <= 1.0 {
            true => Ok(()),
            false => Err(DciSettingsError { field, value: value.to_string(), expected: Expected::Share }),
        };
        let most = u32::MAX as usize;
        count("kept_keys", self.kept_keys, most)?;
        count("levels", self.levels, 8)?;
        count("simple_indices", self.simple_indices, 64)?;
        count("composite_indices", self.composite_indices, 64)?;
        count("build_beam", self.build_beam, most)?;
        share("build_share", self.build_share)?;
        count("query_beam", self.query_beam.unwrap_or(1), most)?;
        share("query_share", self.query_share)
    }

    /// Nodes that a query follows at each level.
    pub(crate) fn beam(&self) -> usize {
        self.query_beam.unwrap_or(self.kept_keys)
    }
}

impl Default for DciSettings {
    fn default() -> Self {
        Self::PUBLISHED
    }
}

/// A setting out of its range.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("dci setting {field} is {value}; expected {expected}")]
pub struct DciSettingsError {
    field: &'static str,
    value: String,
    expected: Expected,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Expected {
    Count(usize),
    Share,
}

impl fmt::Display for Expected {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Count(most) => write!(formatter, "a whole number from 1 to {most}"),
            Self::Share => write!(formatter, "a share above 0 and up to 1"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_out_of_range_are_named() {
        assert_eq!(DciSettings::default().validate(), Ok(()));
        let published = DciSettings::PUBLISHED;
        for (settings, sentence) in [
            (
                DciSettings { kept_keys: 0, ..published },
                "dci setting kept_keys is 0; expected a whole number from 1 to 4294967295",
            ),
            (DciSettings { levels: 9, ..published }, "dci setting levels is 9; expected a whole number from 1 to 8"),
            (
                DciSettings { simple_indices: 0, ..published },
                "dci setting simple_indices is 0; expected a whole number from 1 to 64",
            ),
            (
                DciSettings { composite_indices: 65, ..published },
                "dci setting composite_indices is 65; expected a whole number from 1 to 64",
            ),
            (
                DciSettings { build_beam: 0, ..published },
                "dci setting build_beam is 0; expected a whole number from 1 to 4294967295",
            ),
            (
                DciSettings { build_share: 0.0, ..published },
                "dci setting build_share is 0; expected a share above 0 and up to 1",
            ),
            (
                DciSettings { query_beam: Some(0), ..published },
                "dci setting query_beam is 0; expected a whole number from 1 to 4294967295",
            ),
            (
                DciSettings { query_share: f32::NAN, ..published },
                "dci setting query_share is NaN; expected a share above 0 and up to 1",
            ),
            (
                DciSettings { query_share: 1.5, ..published },
                "dci setting query_share is 1.5; expected a share above 0 and up to 1",
            ),
        ] {
            assert_eq!(settings.validate().expect_err(sentence).to_string(), sentence);
        }
    }
}
