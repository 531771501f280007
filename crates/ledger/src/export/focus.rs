//! FOCUS 1.3: the columns of the FinOps Open Cost and Usage Specification, as CSV.
//!
//! Owns what of ours is called what there. One line for each bucket, application, model and kind of token that
//! was used. What has no price has no SKU price, and then FOCUS wants no quantity: it is in `x_Quantity`.

use std::io::Write;

use super::text::{csv_line, plain};
use super::{Cell, ExportError, Line, Request, Sink};
use crate::date;
use crate::money::{Money, Price, decimal};
use crate::price::{Meter, PriceBook, PriceList};

/// The columns, in the order of the file. Those that never apply here (regions, commitments, contracts,
/// invoices, resources) may be left out by who has none of them, but tools look for a few.
const COLUMNS: &[&str] = &[
    "BilledCost",
    "BillingAccountId",
    "BillingAccountName",
    "BillingAccountType",
    "BillingCurrency",
    "BillingPeriodEnd",
    "BillingPeriodStart",
    "ChargeCategory",
    "ChargeClass",
    "ChargeDescription",
    "ChargeFrequency",
    "ChargePeriodEnd",
    "ChargePeriodStart",
    "ConsumedQuantity",
    "ConsumedUnit",
    "ContractedCost",
    "ContractedUnitPrice",
    "EffectiveCost",
    "HostProviderName",
    "InvoiceIssuerName",
    "ListCost",
    "ListUnitPrice",
    "PricingCategory",
    "PricingQuantity",
    "PricingUnit",
    "ProviderName",
    "PublisherName",
    "RegionId",
    "RegionName",
    "ResourceId",
    "ResourceName",
    "ResourceType",
    "ServiceCategory",
    "ServiceName",
    "ServiceProviderName",
    "ServiceSubcategory",
    "SkuId",
    "SkuMeter",
    "SkuPriceId",
    "SubAccountId",
    "SubAccountName",
    "SubAccountType",
    "Tags",
];
/// Ours, with the prefix that FOCUS keeps for them.
const OWN: &[&str] = &["x_Model", "x_PriceVersion", "x_Quantity", "x_TokenType"];

/// Quantities of device time are hours: 1e-12 of one is 3.6e-3 microseconds.
const PICOS_OF_MICRO: (i128, i128) = (10_000, 36);

pub(super) struct Focus<'a> {
    prices: Option<PriceBook>,
    account: String,
    out: &'a mut (dyn Write + Send),
}

impl<'a> Focus<'a> {
    pub(super) fn new(request: &Request<'_>, out: &'a mut (dyn Write + Send)) -> Result<Self, ExportError> {
        csv_line(out, COLUMNS.iter().chain(OWN))?;
        Ok(Self { prices: request.prices.cloned(), account: request.account.clone(), out })
    }

    /// The value of one column.
    fn value(&self, column: &str, line: &Line, charge: &Charge<'_>) -> String {
        let sums = &line.sums;
        let time = |micros| plain(&Cell::Time(micros));
        let priced = |text: String| if charge.list.is_some() { text } else { String::new() };
        match column {
            "BilledCost" | "ContractedCost" | "EffectiveCost" | "ListCost" => charge.cost.to_string(),
            "BillingAccountId" | "BillingAccountName" => self.account.clone(),
            "BillingAccountType" => "Organisation".into(),
            // Without prices all costs are 0; a currency there must be all the same.
            "BillingCurrency" => self.prices.as_ref().map_or("EUR", PriceBook::currency).into(),
            "BillingPeriodStart" => time(date::month(sums.start).0),
            "BillingPeriodEnd" => time(date::month(sums.start).1),
            "ChargeCategory" => "Usage".into(),
            "ChargeDescription" => format!("{} of {}", charge.meter.as_str().replace('_', " "), sums.model),
            "ChargeFrequency" => "Usage-Based".into(),
            "ChargePeriodStart" => time(sums.start),
            "ChargePeriodEnd" => time(line.end),
            "ConsumedQuantity" | "PricingQuantity" => priced(charge.quantity()),
            "ConsumedUnit" | "PricingUnit" => priced(charge.unit().into()),
            "ContractedUnitPrice" | "ListUnitPrice" => priced(charge.unit_price.to_string()),
            "PricingCategory" => priced("Standard".into()),
            "HostProviderName"
            | "InvoiceIssuerName"
            | "ProviderName"
            | "PublisherName"
            | "ServiceProviderName" => self.account.clone(),
            "ServiceCategory" => "AI and Machine Learning".into(),
            "ServiceName" => "mirai".into(),
            "ServiceSubcategory" => "Generative AI".into(),
            "SkuId" => priced(charge.sku(&sums.model)),
            "SkuMeter" => priced(charge.meter.as_str().into()),
            "SkuPriceId" => charge
                .list
                .map_or_else(String::new, |list| format!("{}/{}", charge.sku(&sums.model), list.version())),
            "SubAccountId" | "SubAccountName" => sums.application.clone(),
            "SubAccountType" => "Application".into(),
            "Tags" => "{}".into(),
            "x_Model" => sums.model.clone(),
            "x_PriceVersion" => sums.price_version.clone(),
            "x_Quantity" => charge.quantity(),
            "x_TokenType" => charge.meter.as_str().into(),
            // Regions, resources, classes of corrections: there are none.
            _ => String::new(),
        }
    }
}

/// What one meter counted in a line.
struct Charge<'a> {
    meter: Meter,
    count: u64,
    /// The list that has a price for it.
    list: Option<&'a PriceList>,
    unit_price: Money,
    cost: Money,
}

impl Charge<'_> {
    fn quantity(&self) -> String {
        if self.meter != Meter::GpuTime {
            return self.count.to_string();
        }
        decimal(i128::from(self.count) * PICOS_OF_MICRO.0 / PICOS_OF_MICRO.1)
    }

    fn unit(&self) -> &'static str {
        if self.meter == Meter::GpuTime { "Hours" } else { "tokens" }
    }

    fn sku(&self, model: &str) -> String {
        format!("{model}/{}", self.meter.as_str())
    }
}

impl Sink for Focus<'_> {
    fn line(&mut self, line: &Line) -> Result<(), ExportError> {
        let (sums, work) = (&line.sums, line.sums.work());
        let list = self.prices.as_ref().and_then(|book| book.version(&sums.price_version));
        for meter in Meter::ALL {
            let price = list.and_then(|list| list.price(&sums.model, meter));
            // Device time that costs nothing is no charge; tokens are told in any case.
            if work.of(meter) == 0 || (meter == Meter::GpuTime && price.is_none()) {
                continue;
            }
            let each = |price: Price| match meter {
                Meter::GpuTime => price.hour(),
                _ => price.each(),
            };
            let charge = Charge {
                meter,
                count: work.of(meter),
                list: list.filter(|_| price.is_some()),
                unit_price: price.map_or(Money::ZERO, each),
                cost: list.and_then(|list| list.metered(&sums.model, meter, &work)).unwrap_or_default(),
            };
            let fields: Vec<String> =
                COLUMNS.iter().chain(OWN).map(|column| self.value(column, line, &charge)).collect();
            csv_line(self.out, &fields)?;
        }
        Ok(())
    }

    fn end(&mut self) -> Result<(), ExportError> {
        Ok(self.out.flush()?)
    }
}
