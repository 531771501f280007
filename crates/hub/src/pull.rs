//! Fills the local store from a hub. Owns when the network may be used; the transfer itself is `hf-hub`'s, behind the cargo feature `download`.

use crate::model_ref::ModelRef;
use crate::selection::PullProgress;
use crate::store::StoreOptions;
use crate::{HubError, LocalModel, resolve};

/// Downloads a repository into the local store and resolves it. Where [`StoreOptions::offline`] is set, only
/// looks at the store, and no socket is opened.
///
/// Blocks; may be called inside or outside of an asynchronous runtime. Files whose hub entry carries a
/// SHA-256 are checked against it.
///
/// # Errors
/// [`HubError::Offline`], [`HubError::DownloadDisabled`] in a build without the feature `download`,
/// [`HubError::Download`], and those of [`resolve`].
pub fn pull(
    reference: &ModelRef,
    options: &StoreOptions,
    progress: impl Fn(PullProgress) + Send + Sync + 'static,
) -> Result<LocalModel, HubError> {
    let ModelRef::HubRepo { org, name, revision } = reference else {
        return Err(HubError::NotARepository { given: reference.to_string() });
    };
    let repo = format!("{org}/{name}");
    if options.offline {
        return resolve(reference, options)
            .map_err(|error| HubError::Offline { repo, reason: error.to_string() });
    }
    #[cfg(feature = "download")]
    {
        crate::download::snapshot(org, name, revision.as_deref(), options, progress)?;
        resolve(reference, options)
    }
    #[cfg(not(feature = "download"))]
    {
        let _ = (revision, progress);
        Err(HubError::DownloadDisabled { repo })
    }
}
