// SPDX-License-Identifier: GPL-2.0

//! What all connections share.

use std::net::SocketAddr;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use crate::access::AccessRules;
use crate::clients::Clients;
use crate::error::ServeError;
use crate::metrics::Metrics;
use crate::peers::Registry;
use crate::scope::Scopes;
use crate::settings::Settings;
use crate::source::{Memory, Source};
use crate::tls;
use crate::turns::Turns;

/// A request and its answer, for the access log.
#[derive(Clone, Debug)]
pub struct Access {
    /// Who asked.
    pub peer: SocketAddr,
    /// The request's method.
    pub method: String,
    /// The request's path, percent-encoded as it came.
    pub path: String,
    /// The bytes asked for, as in the Range header.
    pub range: Option<String>,
    /// The answer's status.
    pub status: u16,
    /// The answer's length in bytes, if it has one.
    pub length: Option<u64>,
    /// From the request to the end of the answer.
    pub time: Duration,
}

/// Who is told what happens.
#[derive(Clone, Copy, Debug, Default)]
pub struct Logs {
    /// Gets a record of each answer.
    pub access: Option<fn(&Access)>,
    /// Gets what the operator should know: objects that cannot be read.
    pub trouble: Option<fn(&str)>,
}

/// What can change while the server runs. A request sees one state of it from its beginning to its end.
#[derive(Debug)]
pub(crate) struct Live {
    pub(crate) settings: Settings,
    pub(crate) rules: Option<AccessRules>,
    pub(crate) tls: Option<Arc<rustls::ServerConfig>>,
}

impl Live {
    /// Reads the files that settings name.
    pub(crate) fn read(settings: Settings) -> Result<Self, ServeError> {
        let rules = match &settings.access {
            Some(path) => Some(AccessRules::read(path)?),
            None => None,
        };
        let wants_names = rules.as_ref().is_some_and(AccessRules::knows_certificates);
        let asks_names = settings
            .tls
            .as_ref()
            .is_some_and(|tls| tls.client_ca.is_some());
        if wants_names && !asks_names {
            return Err(ServeError::Settings(
                "the rules name client certificates, but there is no authority that signs these"
                    .to_owned(),
            ));
        }
        let tls = settings.tls.as_ref().map(tls::config).transpose()?;
        Ok(Live {
            settings,
            rules,
            tls,
        })
    }
}

#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) source: Source,
    pub(crate) scopes: Scopes,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) clients: Arc<Clients>,
    pub(crate) turns: Turns,
    pub(crate) memory: Memory,
    pub(crate) total: tokio::sync::Mutex<crate::clients::Bucket>,
    pub(crate) peers: Registry,
    pub(crate) logs: Logs,
    live: RwLock<Arc<Live>>,
}

impl Shared {
    pub(crate) fn new(
        source: Source,
        live: Live,
        metrics: Arc<Metrics>,
        memory: u64,
        logs: Logs,
    ) -> Self {
        Shared {
            source,
            scopes: Scopes::default(),
            metrics,
            clients: Arc::default(),
            turns: Turns::new(live.settings.active),
            memory: Memory::new(memory),
            total: tokio::sync::Mutex::new(crate::clients::Bucket::new()),
            peers: Registry::default(),
            logs,
            live: RwLock::new(Arc::new(live)),
        }
    }

    pub(crate) fn live(&self) -> Arc<Live> {
        Arc::clone(&self.live.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Takes new settings into use; if anything is wrong with them, the old ones stay.
    pub(crate) fn reload(&self, settings: Settings) -> Result<(), ServeError> {
        let new = Live::read(settings)?;
        if new.tls.is_some() != self.live().tls.is_some() {
            return Err(ServeError::Settings(
                "TLS cannot be switched on or off while the server runs".to_owned(),
            ));
        }
        self.turns.set_limit(new.settings.active);
        *self.live.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(new);
        self.metrics.reloaded();
        Ok(())
    }

    /// What was counted, in Prometheus' text format.
    pub(crate) fn metrics_text(&self) -> String {
        self.metrics.peers(self.peers.len(Instant::now()));
        self.metrics.text()
    }

    /// Tells the operator.
    pub(crate) fn note(&self, text: &str) {
        if let Some(log) = self.logs.trouble {
            log(text);
        }
    }
}
