//! One table for each role: what a configuration may be and which model it makes.
//!
//! A role is written once, as a table of its arms. From it come the configuration enum (`kind = "..."`), the model enum, the way from
//! one to the other, and the lines of `smalti systems`. Beyond its file a system is known by the traits of its role alone, which
//! both enums dereference to.

use crate::systems::Facts;

/// What the table of systems says of a kind, beside its configuration.
pub trait Described {
    /// Paper, tokens, and a line of text.
    const FACTS: Facts;
}

/// Declares a role; see the module.
macro_rules! role {
    (
        $(#[$config_doc:meta])* $Config:ident: $Settings:ident;
        $(#[$model_doc:meta])* $Model:ident: $Trait:ident;
        $(#[$list_doc:meta])* $LIST:ident: $role:ident;
        $( $(#[$doc:meta])* $kind:literal => $Arm:ident($ArmConfig:ident) ),* $(,)?
    ) => {
        $(#[$config_doc])*
        #[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
        #[serde(tag = "kind")]
        pub enum $Config {
            $( $(#[$doc])* #[serde(rename = $kind)] $Arm($ArmConfig), )*
        }

        impl $Config {
            /// A model with fresh parameters.
            ///
            /// # Errors
            /// [`smalti_base::Error::Invalid`] with the setting that is out of range; [`smalti_base::Error::Unsupported`] for
            /// settings that do not go together.
            pub fn init(&self, device: &burn::tensor::Device) -> smalti_base::Result<$Model> {
                Ok(match self {
                    $( Self::$Arm(config) => $Model::$Arm(config.init(device)?), )*
                })
            }

            /// The name of its kind.
            pub fn kind(&self) -> &'static str {
                match self {
                    $( Self::$Arm(_) => $kind, )*
                }
            }
        }

        impl std::ops::Deref for $Config {
            type Target = dyn $Settings;

            fn deref(&self) -> &Self::Target {
                match self {
                    $( Self::$Arm(config) => config, )*
                }
            }
        }

        impl std::ops::DerefMut for $Config {
            fn deref_mut(&mut self) -> &mut Self::Target {
                match self {
                    $( Self::$Arm(config) => config, )*
                }
            }
        }

        $(#[$model_doc])*
        #[derive(burn::module::Module, Debug)]
        #[allow(clippy::large_enum_variant, reason = "a program holds a few of them")]
        pub enum $Model {
            $( $(#[$doc])* $Arm($Arm), )*
        }

        impl std::ops::Deref for $Model {
            type Target = dyn $Trait;

            fn deref(&self) -> &Self::Target {
                match self {
                    $( Self::$Arm(model) => model, )*
                }
            }
        }

        impl std::ops::DerefMut for $Model {
            fn deref_mut(&mut self) -> &mut Self::Target {
                match self {
                    $( Self::$Arm(model) => model, )*
                }
            }
        }

        $(#[$list_doc])*
        pub(crate) const $LIST: &[crate::systems::System] = &[
            $( crate::systems::System::new(
                crate::systems::Role::$role, $kind, <$ArmConfig as crate::role::Described>::FACTS,
            ), )*
        ];
    };
}

pub(crate) use role;
