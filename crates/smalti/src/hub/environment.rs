//! What the environment says, as the hub's own programs understand it.

use smalti_base::{Error, Result, files};
use std::path::PathBuf;

/// Where the hub and its cache are, and who asks.
pub(super) struct Environment {
    /// The folder of all repositories.
    pub cache: PathBuf,
    /// Where the hub is; `None` for the client's own.
    pub endpoint: Option<String>,
    /// Who asks.
    pub token: Option<String>,
    /// Whether the network must not be used.
    pub offline: bool,
}

impl Environment {
    /// Reads the environment and the file of the token.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a value that cannot be used, without a token's text; [`Error::Io`].
    pub fn read() -> Result<Self> {
        let home = match (folder("HF_HOME"), folder("XDG_CACHE_HOME")) {
            (Some(home), _) => Some(home),
            (None, Some(caches)) => Some(caches.join("huggingface")),
            (None, None) => std::env::home_dir().map(|home| home.join(".cache/huggingface")),
        };
        let no_home = || Error::invalid_hint("the hub's cache", "there is no home folder", "set HF_HOME to a folder");
        let hub = || home.as_ref().map(|home| home.join("hub"));
        let cache = folder("HF_HUB_CACHE").or_else(hub).ok_or_else(no_home)?;
        let token_file = folder("HF_TOKEN_PATH").or_else(|| home.as_ref().map(|home| home.join("token")));
        Ok(Self { cache, endpoint: endpoint()?, token: token(token_file)?, offline: is_on("HF_HUB_OFFLINE") })
    }
}

fn text(name: &str) -> Option<String> {
    let value = std::env::var(name).ok()?.trim().to_string();
    (!value.is_empty()).then_some(value)
}

fn folder(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

fn is_on(name: &str) -> bool {
    text(name).is_some_and(|value| ["1", "on", "yes", "true"].contains(&value.to_lowercase().as_str()))
}

fn endpoint() -> Result<Option<String>> {
    let Some(endpoint) = text("HF_ENDPOINT") else { return Ok(None) };
    let endpoint = endpoint.trim_end_matches('/').to_string();
    let host = endpoint.strip_prefix("https://").or(endpoint.strip_prefix("http://"));
    match host.is_some_and(|host| !host.is_empty()) && endpoint.parse::<ureq::http::Uri>().is_ok() {
        true => Ok(Some(endpoint)),
        false => Err(Error::invalid("HF_ENDPOINT", format!("`{endpoint}` is not an address; expected https://HOST"))),
    }
}

fn token(file: Option<PathBuf>) -> Result<Option<String>> {
    let (place, token) = match (text("HF_TOKEN"), file.filter(|file| file.is_file())) {
        (Some(token), _) => ("HF_TOKEN".to_string(), token),
        (None, Some(file)) => (file.display().to_string(), files::read_text(&file)?.trim().to_string()),
        (None, None) => return Ok(None),
    };
    match token.bytes().all(|byte| byte.is_ascii_graphic()) {
        true => Ok((!token.is_empty()).then_some(token)),
        false => Err(Error::invalid(place, "is not a token: it contains spaces, or characters that are not ASCII")),
    }
}
