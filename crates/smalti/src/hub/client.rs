//! What is asked of the hub, and what its refusals mean.

use super::address::{Address, is_commit, is_path};
use super::environment::Environment;
use hf_hub::api::RepoInfo;
use hf_hub::api::sync::{Api, ApiBuilder};
use hf_hub::{Cache, Repo, RepoType};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use smalti_base::{Error, Result};
use std::time::Duration;
use ureq::http::header::{ACCEPT_ENCODING, AUTHORIZATION, CONTENT_LENGTH, CONTENT_RANGE, ETAG, LOCATION, RANGE};
use ureq::http::{Response, Uri};
use ureq::{Agent, Body};

/// What may stand in a path as it is.
const PLAIN: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~').remove(b'/');
/// Longest time until a connection stands.
const CONNECT: Duration = Duration::from_secs(20);
/// Longest silence of the other side.
const SILENCE: Duration = Duration::from_secs(60);
/// Most hosts that a file is looked for at.
const REDIRECTS: usize = 8;
/// Largest listing of a repository in bytes.
const LISTING: u64 = 64 << 20;

/// Why the hub gave no listing.
pub(super) enum Trouble {
    /// It did not answer.
    Unreachable(Error),
    /// It answered otherwise.
    Refused(Error),
}

/// What a revision holds.
pub(super) struct Listing {
    /// The commit that it is.
    pub commit: String,
    /// The paths of its files.
    pub files: Vec<String>,
}

/// A file on the hub.
#[derive(Debug)]
pub(super) struct Remote {
    /// Its path in the repository.
    pub path: String,
    /// Where it is asked for.
    pub url: String,
    /// The name of its bytes: for large files their SHA-256.
    pub etag: String,
    /// Its size in bytes, if it is told.
    pub size: Option<u64>,
}

/// Speaks with the hub about one repository.
pub(super) struct Client {
    address: Address,
    api: Api,
    agent: Agent,
    token: Option<String>,
}

impl Client {
    /// A client that has not asked anything yet.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the client crate refuses the settings.
    pub fn new(environment: &Environment, address: &Address) -> Result<Self> {
        let mut builder = ApiBuilder::from_cache(Cache::new(environment.cache.clone()))
            .with_progress(false)
            .with_token(environment.token.clone())
            .with_user_agent("smalti", env!("CARGO_PKG_VERSION"));
        if let Some(endpoint) = &environment.endpoint {
            builder = builder.with_endpoint(endpoint.clone());
        }
        let api = builder.build().map_err(|error| Error::invalid(address, format!("the hub's client: {error}")))?;
        // Redirects are followed here, since the token is for the hub alone.
        let agent = Agent::config_builder()
            .max_redirects(0)
            .http_status_as_error(false)
            .timeout_connect(Some(CONNECT))
            .timeout_per_read(Some(SILENCE))
            .timeout_recv_response(Some(SILENCE))
            .user_agent(concat!("smalti/", env!("CARGO_PKG_VERSION")))
            .build()
            .new_agent();
        Ok(Self { address: address.clone(), api, agent, token: environment.token.clone() })
    }

    /// What is asked for.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// The commit and the files of the address's revision.
    ///
    /// # Errors
    /// [`Trouble`].
    pub fn listing(&self) -> Result<Listing, Trouble> {
        let revision = self.address.revision();
        let mut response = self.info(revision)?;
        let status = response.status().as_u16();
        if status != 200 {
            return Err(Trouble::Refused(match self.lacks_revision(&response) {
                true => self.no_revision(),
                false => self.refusal(&response),
            }));
        }
        let not_hub = |problem: String| {
            let problem = format!("{} does not answer as a hub does: {problem}", self.host());
            Trouble::Refused(Error::invalid_hint(&self.address, problem, "is HF_ENDPOINT the address of a hub?"))
        };
        let body = response.body_mut().with_config().limit(LISTING);
        let info: RepoInfo = body.read_json().map_err(|error| not_hub(format!("expected a listing, {error}")))?;
        if !is_commit(&info.sha) {
            return Err(not_hub(format!("`{}` is not a commit", info.sha)));
        }
        let files = info.siblings.into_iter().map(|file| file.rfilename).filter(|file| is_path(file)).collect();
        Ok(Listing { commit: info.sha, files })
    }

    fn info(&self, revision: &str) -> Result<Response<Body>, Trouble> {
        let repo = Repo::with_revision(self.address.repo().into(), RepoType::Model, revision.into());
        let request = self.api.repo(repo).info_request().config();
        request
            .http_status_as_error(false)
            .timeout_connect(Some(CONNECT))
            .timeout_per_read(Some(SILENCE))
            .timeout_recv_response(Some(SILENCE))
            .build()
            .call()
            .map_err(|error| Trouble::Unreachable(self.unreachable(&error)))
    }

    /// Whether the repository is there, but not the revision.
    fn lacks_revision(&self, response: &Response<Body>) -> bool {
        match (response.status().as_u16(), code(response)) {
            (_, "RevisionNotFound") => true,
            (404, "") => self.address.revision() != "main" && self.info("main").is_ok_and(|it| it.status() == 200),
            _ => false,
        }
    }

    fn no_revision(&self) -> Error {
        let problem = format!("the repository has no branch, tag or commit `{}`", self.address.revision());
        Error::invalid_hint(&self.address, problem, "without @REVISION the main branch is used")
    }

    /// The etag and size of a file.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the hub cannot be reached, refuses, or answers what no hub answers.
    pub fn describe(&self, commit: &str, path: &str) -> Result<Remote> {
        let repo = Repo::with_revision(self.address.repo().into(), RepoType::Model, commit.into());
        let url = self.api.repo(repo).url(&utf8_percent_encode(path, PLAIN).to_string());
        // Headers alone are wanted, but not every server answers HEAD as it answers GET.
        let response =
            self.get(&url, Some("bytes=0-0".into()), |response| response.headers().contains_key("x-linked-etag"))?;
        if !response.status().is_redirection() && !response.status().is_success() {
            return Err(self.refusal(&response));
        }
        let header = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok());
        let etag = header("x-linked-etag").or(header(ETAG.as_str())).map(plain_etag).unwrap_or_default();
        if !is_etag(&etag) {
            let problem = format!("{} gives no usable etag for `{path}`: `{etag}`", self.host());
            return Err(Error::invalid_hint(&self.address, problem, "is HF_ENDPOINT the address of a hub?"));
        }
        let whole = || header(CONTENT_RANGE.as_str()).and_then(|range| range.rsplit_once('/')).map(|(_, size)| size);
        let length = || header(CONTENT_LENGTH.as_str()).filter(|_| response.status() == 200);
        let size = header("x-linked-size").or_else(whole).or_else(length).and_then(|size| size.trim().parse().ok());
        Ok(Remote { path: path.into(), url, etag, size })
    }

    /// Asks for a range of bytes, or for all, and goes where the answer leads, unless it is `enough`.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a host cannot be reached or leads nowhere.
    pub fn get(
        &self,
        url: &str,
        range: Option<String>,
        enough: impl Fn(&Response<Body>) -> bool,
    ) -> Result<Response<Body>> {
        let astray = |problem: String| Error::invalid_hint(&self.address, problem, "try again later");
        let first: Uri = url.parse().map_err(|_| astray(format!("`{url}` is not an address")))?;
        let mut at = first.clone();
        for _ in 0..REDIRECTS {
            let mut request = self.agent.get(&at).header(ACCEPT_ENCODING, "identity");
            if let Some(range) = &range {
                request = request.header(RANGE, range);
            }
            if let Some(token) = self.token.as_ref().filter(|_| same_host(&first, &at)) {
                request = request.header(AUTHORIZATION, format!("Bearer {token}"));
            }
            let response = request.call().map_err(|error| self.unreachable(&error))?;
            if !response.status().is_redirection() || enough(&response) {
                return Ok(response);
            }
            let target = response.headers().get(LOCATION).and_then(|target| target.to_str().ok()).unwrap_or_default();
            let next = follow(&at, target)
                .ok_or_else(|| astray(format!("the hub redirects to `{target}`, which is not an address")))?;
            if at.scheme_str() == Some("https") && next.scheme_str() != Some("https") {
                return Err(astray(format!("the hub redirects to `{target}`, which is not encrypted")));
            }
            at = next;
        }
        Err(astray(format!("the hub redirected {REDIRECTS} times and reached no file")))
    }

    /// Where the hub is, for people: without a password that the address may have.
    fn host(&self) -> String {
        let url = self.api.model(self.address.repo().into()).url("");
        let place = |uri: Uri| {
            let port = uri.port().map(|port| format!(":{port}")).unwrap_or_default();
            Some(format!("{}://{}{port}", uri.scheme_str()?, uri.host()?))
        };
        url.parse::<Uri>().ok().and_then(place).unwrap_or_else(|| "its address".into())
    }

    fn unreachable(&self, error: &ureq::Error) -> Error {
        Error::invalid_hint(
            &self.address,
            format!("the hub cannot be reached at {}: {error}", self.host()),
            "check the connection, HF_ENDPOINT and the proxy; --offline uses what is in the cache",
        )
    }

    /// What an unsuccessful status means.
    pub fn refusal(&self, response: &Response<Body>) -> Error {
        let status = response.status().as_u16();
        let said = response.headers().get("x-error-message").and_then(|text| text.to_str().ok());
        let said = said.map(|text| format!(" ({text})")).unwrap_or_default();
        let repo = self.address.repo();
        let (problem, hint) = match (status, code(response)) {
            (401 | 403, "GatedRepo") => (format!("`{repo}` is gated"), self.access()),
            (401, _) => (format!("`{repo}` does not exist, or is private or gated"), self.access()),
            (403, _) => (format!("`{repo}` is gated or forbidden to this account"), self.access()),
            (404, "EntryNotFound") => ("there is no such file".into(), "is it in another revision?".into()),
            (404, _) => (format!("there is no repository `{repo}`"), "check the name on the hub's page".into()),
            (408 | 429 | 500.., _) => ("the hub is busy or broken".into(), "try again later".into()),
            _ => ("the hub refused the request".into(), "is HF_ENDPOINT the address of a hub?".into()),
        };
        Error::invalid_hint(&self.address, format!("{problem}: {} answers {status}{said}", self.host()), hint)
    }

    fn access(&self) -> String {
        let licence = "if the repository is gated, accept its licence on its page";
        match self.token {
            None => format!("set HF_TOKEN to the token of an account that may read it; {licence}"),
            Some(_) => format!("a token was sent: is it valid, and may its account read the repository? {licence}"),
        }
    }
}

/// The hub's own name for a refusal.
fn code(response: &Response<Body>) -> &str {
    response.headers().get("x-error-code").and_then(|code| code.to_str().ok()).unwrap_or_default()
}

fn plain_etag(etag: &str) -> String {
    etag.trim().trim_start_matches("W/").trim_matches('"').to_string()
}

/// Whether it can be a file's name.
fn is_etag(etag: &str) -> bool {
    let letters = etag.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte));
    letters && (1..=128).contains(&etag.len())
}

fn same_host(a: &Uri, b: &Uri) -> bool {
    a.scheme() == b.scheme() && a.authority() == b.authority()
}

/// Where a redirect leads.
fn follow(at: &Uri, target: &str) -> Option<Uri> {
    let (scheme, authority) = (at.scheme_str()?, at.authority()?);
    let whole = if target.is_empty() {
        return None;
    } else if target.contains("://") {
        target.to_string()
    } else if target.starts_with("//") {
        format!("{scheme}:{target}")
    } else if target.starts_with('/') {
        format!("{scheme}://{authority}{target}")
    } else {
        let folder = at.path().rsplit_once('/').map_or("", |(folder, _)| folder);
        format!("{scheme}://{authority}{folder}/{target}")
    };
    whole.parse().ok().filter(|uri: &Uri| matches!(uri.scheme_str(), Some("http" | "https")) && uri.host().is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_are_relative_to_where_they_are() {
        let at: Uri = "http://hub:80/a/resolve/b?c".parse().unwrap();
        for (target, whole) in [
            ("/x/y", Some("http://hub:80/x/y")),
            ("y?z=1", Some("http://hub:80/a/resolve/y?z=1")),
            ("//cdn/x", Some("http://cdn/x")),
            ("https://cdn/x", Some("https://cdn/x")),
            ("file:///etc/passwd", None),
            ("", None),
        ] {
            assert_eq!(follow(&at, target).map(|uri| uri.to_string()).as_deref(), whole, "{target}");
        }
        let parse = |text: &str| text.parse::<Uri>().unwrap();
        assert!(same_host(&at, &parse("http://hub:80/other")) && !same_host(&at, &parse("http://hub:81/")));
    }

    #[test]
    fn etags_are_names_of_files() {
        assert_eq!(plain_etag("W/\"abc\""), "abc");
        assert!(is_etag("0123abcdef") && !is_etag("../x") && !is_etag("a/b") && !is_etag(""));
    }
}
