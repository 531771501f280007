//! For whom a gateway speaks.
//!
//! Owns the reading of the headers that name an application and a user. They are read only for the key of an
//! application that the file calls a gateway: from anybody else they mean nothing.

use hyper::HeaderMap;
use hyper::header::HeaderName;

use mirai_ledger::identity::is_client_id;

use super::applications::Registry;
use super::caller::{Caller, User};
use super::config::{GATEWAY, GatewayConfig, Unknown};
use crate::error::ApiError;

/// Which headers count.
#[derive(Debug)]
pub(super) struct Gateway {
    application: Option<HeaderName>,
    user: Option<HeaderName>,
    /// Member of the body's `metadata`.
    metadata: String,
    unknown: Unknown,
}

impl Gateway {
    /// Of a configuration that was validated.
    pub(super) fn new(config: &GatewayConfig) -> Self {
        let header = |name: &str| HeaderName::try_from(name).ok();
        Self {
            application: header(&config.application_header),
            user: header(&config.user_header),
            metadata: config.application_metadata.clone(),
            unknown: config.unknown_application,
        }
    }

    /// The caller that a gateway's headers name.
    ///
    /// # Errors
    /// 400 for a header that comes twice or is malformed, 403 for an application that nobody knows.
    pub(super) fn by_headers(
        &self,
        gateway: Caller,
        headers: &HeaderMap,
        registry: &Registry,
    ) -> Result<Caller, ApiError> {
        let user = one(headers, self.user.as_ref())?.map(|user| User::new(user).ok_or_else(malformed));
        let application = one(headers, self.application.as_ref())?;
        let mut gateway = gateway;
        gateway.user = user.transpose()?;
        match application {
            Some(name) => self.resolve(&gateway, name, registry),
            None => Ok(Caller { may_name: true, ..gateway }),
        }
    }

    /// The caller that the `metadata` of a gateway's body names.
    ///
    /// # Errors
    /// 400 for what is no name, 403 for an application that nobody knows.
    pub(super) fn by_body(
        &self,
        gateway: Caller,
        metadata: &[(String, String)],
        registry: &Registry,
    ) -> Result<Caller, ApiError> {
        let named = metadata.iter().find(|(member, _)| !self.metadata.is_empty() && *member == self.metadata);
        match named {
            Some((_, name)) => self.resolve(&gateway, name, registry),
            None => Ok(gateway),
        }
    }

    fn resolve(&self, gateway: &Caller, name: &str, registry: &Registry) -> Result<Caller, ApiError> {
        // Where two headers were merged into one, the comma tells.
        if !is_client_id(name) || name.contains(',') {
            return Err(malformed());
        }
        match registry.client(GATEWAY, name).or_else(|| registry.named(name)) {
            Some(known) => Ok(gateway.for_application(&known)),
            None if self.unknown == Unknown::Gateway => Ok(Caller { may_name: false, ..gateway.clone() }),
            None => {
                Err(ApiError::unknown_application("the application that the gateway names is not known here"))
            }
        }
    }
}

fn malformed() -> ApiError {
    ApiError::bad_request("what the gateway says of its caller is malformed")
}

/// The header's one value.
fn one<'a>(headers: &'a HeaderMap, name: Option<&HeaderName>) -> Result<Option<&'a str>, ApiError> {
    let Some(name) = name else { return Ok(None) };
    let mut values = headers.get_all(name).iter();
    let (Some(value), more) = (values.next(), values.next()) else { return Ok(None) };
    if more.is_some() {
        return Err(malformed());
    }
    let text = std::str::from_utf8(value.as_bytes()).map_err(|_| malformed())?;
    if text.contains(',') {
        return Err(malformed());
    }
    Ok(Some(text))
}
