//! A run knows the data that it began with.

use crate::Changes;
use crate::objective::Objective;
use crate::run_folder::RunFolder;
use smalti_base::{Error, Progress, Result};

/// Says what was found wrong in the data, and compares them with those that the run began with. The first time, and if changes are
/// accepted, they are noted in the run's folder.
///
/// # Errors
/// [`Error::Mismatch`] for other data than the run began with; [`Error::Io`].
pub(crate) fn must_be_the_same<O: Objective>(
    objective: &O,
    folder: &RunFolder,
    changes: Changes,
    progress: &dyn Progress,
) -> Result<()> {
    objective.warnings().iter().for_each(|warning| progress.say(&format!("warning: {warning}")));
    let (now, known) = (objective.inputs()?, folder.inputs()?);
    let is_begun = !folder.steps()?.is_empty();
    let changed = now.iter().filter_map(|(key, now)| Some((key, now, known.get(key)?)));
    for (key, now, then) in changed.filter(|(_, now, then)| now != then && is_begun) {
        if changes == Changes::Refuse {
            return Err(Error::Mismatch {
                what: format!("{key} and the run in {}", folder.root().display()),
                left_name: "the run began with".into(),
                left: then.clone(),
                right_name: "there is now".into(),
                right: now.clone(),
                hint: Some(
                    "bring the former data back, choose another folder with --out, or go on with --data-changed".into(),
                ),
            });
        }
        progress.say(&format!("warning: {key}: the run began with {then}; it goes on with {now}"));
    }
    if now != known { folder.write_inputs(&now) } else { Ok(()) }
}
